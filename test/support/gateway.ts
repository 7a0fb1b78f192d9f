/** A whole gateway on a database of its own, and clients that speak to it as other people's would. */
import { randomUUID } from 'node:crypto';
import { io, type Socket } from 'socket.io-client';
import { createGateway, type Gateway, type NodeTiming } from '../../src/compose.ts';
import { environment } from '../../src/config/environment.ts';
import { type Config, parseConfig } from '../../src/config.ts';
import type { Clock } from '../../src/lib/clock.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { type Log, silentLog } from '../../src/lib/log.ts';
import type { ErrorObject } from '../../src/protocol/errors.ts';
import type {
  MessagesAcknowledgement,
  PushName,
  PushPayload,
  Reply,
  RequestData,
  RequestInput,
  RequestName,
} from '../../src/protocol/events.ts';
import type { DeviceAddress } from '../../src/protocol/ids.ts';
import type { ServerToClientEvents } from '../../src/protocol/socket-types.ts';
import { signToken } from '../../src/requests/authenticate.ts';
import { createDatabase } from './engines.ts';
import { SignalDevice } from './libsignal-device.ts';

export const TEST_SECRET = randomUUID() + randomUUID();

export interface TestGateway {
  url: string;
  adminUrl: string;
  config: Config;
  databaseUrl: string;
  token(device: DeviceAddress, ttlMs?: number): Promise<string>;
  /** A connected client of the device. */
  connect(device: DeviceAddress): Promise<Client>;
  stop(): Promise<void>;
}

export interface TestGatewayOptions {
  /** Environment beyond the harness's own. */
  env?: Record<string, string>;
  clock?: Clock;
  comparesClock?: boolean;
  log?: Log;
  /** Shares the store of another gateway; it is not dropped then. */
  databaseUrl?: string;
  redisUrl?: string;
  timing?: NodeTiming;
}

/** What a test does in a second a client may not do in an hour: limits are off but where one is looked at. */
export const NO_LIMITS: Readonly<Record<string, string>> = Object.fromEntries(
  Object.keys(environment.shape)
    .filter((name) => name.startsWith('LIMIT_'))
    .map((name) => [name, '0']),
);

export function testEnvironment(options: { databaseUrl: string; redisUrl?: string | undefined }) {
  return {
    PORT: '0',
    ADMIN_PORT: '0',
    HOST: '127.0.0.1',
    LOG_LEVEL: 'error',
    PREKEY_DRAIN_ALARM: '0',
    ...NO_LIMITS,
    DATABASE_URL: options.databaseUrl,
    JWT_SECRET: TEST_SECRET,
    ...(options.redisUrl === undefined ? {} : { REDIS_URL: options.redisUrl }),
  };
}

/** Starts a gateway in this process, on a fresh database unless one is given. */
export async function startGateway(options: TestGatewayOptions = {}): Promise<TestGateway> {
  const database = options.databaseUrl === undefined ? await createDatabase() : null;
  const databaseUrl = options.databaseUrl ?? database!.url;
  const config = parseConfig({
    ...testEnvironment({ databaseUrl, redisUrl: options.redisUrl }),
    ...options.env,
  });
  const clock = options.clock ?? systemClock;
  const gateway: Gateway = await createGateway(config, {
    clock,
    log: options.log ?? silentLog,
    ...(options.comparesClock === undefined ? {} : { comparesClock: options.comparesClock }),
    ...(options.timing === undefined ? {} : { timing: options.timing }),
  });
  const clients: Client[] = [];
  const token = (device: DeviceAddress, ttlMs = 3_600_000) => tokenFor(device, { ttlMs, clock });
  return {
    url: gateway.url,
    adminUrl: gateway.adminUrl,
    config,
    databaseUrl,
    token,
    async connect(device) {
      const client = await connectClient(gateway.url, await token(device));
      clients.push(client);
      return client;
    },
    async stop() {
      for (const client of clients) client.close();
      await gateway.stop();
      await database?.drop();
    },
  };
}

export async function tokenFor(
  device: DeviceAddress,
  options: { ttlMs?: number; clock?: Clock } = {},
): Promise<string> {
  return await signToken({
    secret: new TextEncoder().encode(TEST_SECRET),
    device,
    ttlMs: options.ttlMs ?? 3_600_000,
    clock: options.clock ?? systemClock,
  });
}

/** A refusal, thrown where a test expects success. */
export class RefusedError extends Error {
  readonly error: ErrorObject;

  constructor(name: string, error: ErrorObject) {
    super(`${name}: ${error.code}: ${error.message} ${JSON.stringify(error.details ?? '')}`);
    this.error = error;
  }
}

export interface Client {
  socket: Socket<ServerToClientEvents>;
  /** The reply as it came. */
  ask<Name extends RequestName>(name: Name, input?: RequestInput<Name>): Promise<Reply<Name>>;
  /** The data of a request that must succeed. @throws RefusedError */
  call<Name extends RequestName>(name: Name, input?: RequestInput<Name>): Promise<RequestData<Name>>;
  /** The code of a request that must be refused. */
  refusal<Name extends RequestName>(name: Name, input?: RequestInput<Name>): Promise<ErrorObject>;
  /** The next push of this name that was not waited for yet; pushes are kept from the start. */
  next<Name extends Exclude<PushName, 'messages'>>(name: Name): Promise<PushPayload<Name>>;
  /** Pushes of this name that came and were not waited for. */
  waiting(name: PushName): number;
  /** How `messages` are acknowledged; by default everything is processed. Null leaves pages unanswered. */
  onMessages: (page: PushPayload<'messages'>) => MessagesAcknowledgement | null;
  /** Every envelope that was pushed, in order. */
  envelopes: PushPayload<'messages'>['envelopes'];
  /** Every push in the order of arrival. */
  pushes: { name: PushName; payload: unknown }[];
  disconnected: Promise<string>;
  close(): void;
}

/** Connects a client that does not reconnect by itself. @throws the handshake's error object as RefusedError */
export async function connectClient(url: string, token: string): Promise<Client> {
  const socket: Socket = io(url, {
    transports: ['websocket'],
    auth: { token },
    reconnection: false,
    forceNew: true,
  });
  const client = clientOf(socket);
  await new Promise<void>((resolve, reject) => {
    socket.once('connect', resolve);
    socket.once('connect_error', (error: Error & { data?: ErrorObject }) => {
      socket.close();
      reject(error.data === undefined ? error : new RefusedError('handshake', error.data));
    });
  });
  return client;
}

const PUSHES_WITHOUT_ACKNOWLEDGEMENT = [
  'queueEmpty',
  'preKeysLow',
  'gateClosed',
  'tokenExpiring',
  'displaced',
  'serverDraining',
] as const;

function clientOf(socket: Socket): Client {
  const queues = new Map<string, unknown[]>();
  const waiters = new Map<string, ((payload: unknown) => void)[]>();
  const client: Client = {
    socket: socket as unknown as Socket<ServerToClientEvents>,
    ask: (name, input) =>
      new Promise((resolve, reject) => {
        const broken = (reason: string): void => reject(new Error(`${name}: disconnected: ${reason}`));
        if (!socket.connected) return broken('before it was asked');
        socket.once('disconnect', broken);
        socket.emit(name, input ?? {}, (reply: never) => {
          socket.off('disconnect', broken);
          resolve(reply);
        });
      }),
    async call(name, input) {
      const reply = await client.ask(name, input);
      if (!reply.ok) throw new RefusedError(name, reply.error);
      return reply.data;
    },
    async refusal(name, input) {
      const reply = await client.ask(name, input);
      if (reply.ok) throw new Error(`${name} succeeded: ${JSON.stringify(reply.data)}`);
      return reply.error;
    },
    next: (name) =>
      new Promise((resolve) => {
        const queue = queues.get(name) ?? [];
        if (queue.length > 0) resolve(queue.shift() as never);
        else waiters.set(name, [...(waiters.get(name) ?? []), resolve as (payload: unknown) => void]);
      }),
    waiting: (name) => queues.get(name)?.length ?? 0,
    onMessages: (page) => ({ processed: page.envelopes.map((envelope) => envelope.id) }),
    envelopes: [],
    pushes: [],
    disconnected: new Promise((resolve) => socket.once('disconnect', resolve)),
    close: () => socket.close(),
  };
  for (const name of PUSHES_WITHOUT_ACKNOWLEDGEMENT) {
    socket.on(name, (payload: unknown) => {
      client.pushes.push({ name, payload });
      const waiter = waiters.get(name)?.shift();
      if (waiter !== undefined) waiter(payload);
      else queues.set(name, [...(queues.get(name) ?? []), payload]);
    });
  }
  socket.on('messages', (page: PushPayload<'messages'>, acknowledge: (value: unknown) => void) => {
    client.pushes.push({ name: 'messages', payload: page });
    client.envelopes.push(...page.envelopes);
    const answer = client.onMessages(page);
    if (answer !== null) acknowledge(answer);
  });
  return client;
}

/** A real libsignal device with its client, keys uploaded. */
export interface Party {
  device: SignalDevice;
  address: DeviceAddress;
  client: Client;
}

export async function enrol(
  gateway: Pick<TestGateway, 'connect'>,
  address: DeviceAddress,
  keys: { oneTimePreKeys?: number; pqOneTimePreKeys?: number } = {},
): Promise<Party> {
  const device = new SignalDevice(address);
  const client = await gateway.connect(address);
  await client.call('uploadKeys', device.uploadInput({ oneTimePreKeys: 10, pqOneTimePreKeys: 5, ...keys }));
  return { device, address, client };
}

/** Validates and opens the gate. */
export async function open(party: Pick<Party, 'device' | 'client'>): Promise<RequestData<'clientReady'>> {
  const { validation } = await party.client.call('validateKeys', party.device.validateInput());
  return await party.client.call('clientReady', { validation: validation! });
}

/** Sends bytes that mean nothing, as a server sees all of them. */
export async function send(
  from: Client,
  to: { address: DeviceAddress; device: { registrationId: number } },
  content: string,
  messageId: string = randomUUID(),
): Promise<string> {
  await from.call('sendMessages', {
    messageId,
    userId: to.address.userId,
    envelopes: [
      {
        deviceId: to.address.deviceId,
        registrationId: to.device.registrationId,
        type: 3,
        content: Buffer.from(content).toString('base64'),
      },
    ],
  });
  return messageId;
}

/** What a client was handed, decoded; bounces as their reason. */
export function contents(client: Client): string[] {
  return client.envelopes.map((envelope) =>
    envelope.kind === 'bounce' ? envelope.reason : Buffer.from(envelope.content, 'base64').toString(),
  );
}
