/** The admin API as the page calls it. */
import { type AdminAnswer, type AdminError, adminRoutes } from '../../protocol/inspector/admin-api.ts';
import type { GateName } from '../../protocol/inspector/values.ts';

/** A refusal, with a sentence that a reader can act on. */
export class ApiError extends Error {
  readonly code: AdminError['error']['code'] | 'UNREACHABLE';

  constructor(code: ApiError['code'], message: string) {
    super(message);
    this.code = code;
  }
}

/** Those that answer once; the others are streams. */
type AnsweredRoute = Exclude<keyof typeof adminRoutes, 'stream' | 'overview'>;

/** Called when the server no longer knows this session. */
let onSignedOut: () => void = () => {};
export function whenSignedOut(action: () => void): void {
  onSignedOut = action;
}

export const api = {
  session: () => ask<'session'>('GET', adminRoutes.session.path),
  login: (token: string) => ask<'login'>('POST', adminRoutes.login.path, { token }),
  logout: () => ask<'logout'>('POST', adminRoutes.logout.path, {}),
  sockets: (query: { device?: string | undefined; gate?: GateName | undefined }) =>
    ask<'sockets'>('GET', adminRoutes.sockets.path + queryOf(query)),
  device: (device: string, query: { messageId?: string | undefined }) =>
    ask<'device'>(
      'GET',
      adminRoutes.device.path.replace(':device', encodeURIComponent(device)) + queryOf(query),
    ),
  message: (messageId: string, query: { recipient?: string | undefined }) =>
    ask<'message'>(
      'GET',
      adminRoutes.message.path.replace(':messageId', encodeURIComponent(messageId)) + queryOf(query),
    ),
  disconnect: (socket: { node: string; socket: number }) =>
    ask<'disconnect'>('POST', adminRoutes.disconnect.path, socket),
};

/** Where the session has ended, {@link whenSignedOut} hears of it. */
export function checkSession(): void {
  api.session().catch(() => {});
}

function queryOf(fields: Record<string, string | undefined>): string {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(fields)) if (value) query.set(name, value);
  return query.size === 0 ? '' : `?${query}`;
}

/** @throws ApiError */
async function ask<Name extends AnsweredRoute>(
  method: 'GET' | 'POST',
  path: string,
  body?: object,
): Promise<AdminAnswer<Name>> {
  let response: Response;
  try {
    response = await fetch(path, {
      method,
      credentials: 'same-origin',
      ...(body && { headers: { 'content-type': 'application/json' }, body: JSON.stringify(body) }),
    });
  } catch {
    throw new ApiError('UNREACHABLE', 'The gateway does not answer. Is it running?');
  }
  const answer = (await response.json().catch(() => null)) as AdminAnswer<Name> | AdminError | null;
  if (response.ok && answer !== null) return answer as AdminAnswer<Name>;
  const { code, message } = (answer as AdminError | null)?.error ?? {
    code: 'INTERNAL' as const,
    message: `The gateway answered ${response.status} without a reason.`,
  };
  if (code === 'UNAUTHENTICATED' && path !== adminRoutes.login.path) onSignedOut();
  throw new ApiError(code, message);
}
