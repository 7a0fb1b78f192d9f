/** The network address that a caller is counted by: the connection's own, unless a trusted proxy names another. */
import { BlockList, isIP } from 'node:net';

/** What of an HTTP request says where it comes from. */
export interface Origination {
  remoteAddress: string | undefined;
  /** The `X-Forwarded-For` header. */
  forwardedFor: string | string[] | undefined;
}

/** @returns an IPv4 address, or the first half of an IPv6 address, which one subscriber has to himself */
export type ClientAddressOf = (request: Origination) => string;

/**
 * Every hop appends the address that it was called by, so only what trusted proxies appended is believed: the list is
 * read from its end up to the first address that is no trusted proxy. What stands before it the caller may have made up.
 *
 * @param trustedProxies addresses and networks such as `10.0.0.0/8`; empty trusts nobody, and the header is not read
 */
export function createClientAddressOf(trustedProxies: readonly string[]): ClientAddressOf {
  const trusted = trustedNetworks(trustedProxies);
  const isTrusted = (address: string): boolean =>
    trusted.check(address, isIP(address) === 6 ? 'ipv6' : 'ipv4');

  return ({ remoteAddress, forwardedFor }) => {
    let address = plain(remoteAddress ?? '');
    if (isIP(address) === 0) return 'unknown';
    if (forwardedFor !== undefined && isTrusted(address)) {
      const hops = String(forwardedFor).split(',').map(plain);
      for (let hop = hops.pop(); hop !== undefined && isIP(hop) !== 0; hop = hops.pop()) {
        address = hop;
        if (!isTrusted(address)) break;
      }
    }
    return isIP(address) === 6 ? `${subscriberOf(address)}::/64` : address;
  };
}

/** @throws Error for what is neither an address nor a network */
export function trustedNetworks(list: readonly string[]): BlockList {
  const networks = new BlockList();
  for (const text of list) {
    const [address = '', prefix, ...rest] = text.split('/');
    const version = isIP(address);
    const bits = version === 6 ? 128 : 32;
    const length = prefix === undefined ? bits : /^\d{1,3}$/.test(prefix) ? Number(prefix) : Number.NaN;
    // A prefix of 0 would trust everybody.
    if (version === 0 || rest.length > 0 || !(length >= 1 && length <= bits)) {
      throw new Error('must list addresses or networks such as 10.0.0.0/8, separated by commas');
    }
    networks.addSubnet(address, length, version === 6 ? 'ipv6' : 'ipv4');
  }
  return networks;
}

/** Without the port and the brackets that some proxies write; IPv4 also where it is within IPv6, in either spelling. */
function plain(text: string): string {
  const spelled = text.trim();
  const [, bracketed] = /^\[([^\]]+)\](?::\d+)?$/.exec(spelled) ?? [];
  const address = bracketed ?? spelled.replace(/^(.+\.\d+):\d+$/, '$1');
  const [, high, low] = /^::ffff:([\da-f]{1,4}):([\da-f]{1,4})$/i.exec(address) ?? [];
  if (high === undefined || low === undefined) return address.replace(/^::ffff:(?=\d+\.)/i, '');
  return [high, low]
    .map((half) => Number.parseInt(half, 16))
    .flatMap((half) => [half >> 8, half & 0xff])
    .join('.');
}

/** The first four groups, in one spelling. */
function subscriberOf(address: string): string {
  const [head = '', tail] = address.split('%')[0]!.split('::');
  const groups = head === '' ? [] : head.split(':');
  const after = tail === undefined || tail === '' ? [] : tail.split(':');
  if (tail !== undefined) {
    while (groups.length + after.length < 8) groups.push('0');
    groups.push(...after);
  }
  return groups
    .slice(0, 4)
    .map((group) => Number.parseInt(group, 16).toString(16))
    .join(':');
}
