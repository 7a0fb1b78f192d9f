import { describe, expect, it } from 'vitest';
import { createClientAddressOf } from '../../src/requests/client-address.ts';

describe('the address of a caller', () => {
  const direct = createClientAddressOf([]);
  const behind = createClientAddressOf(['10.0.0.0/8', '192.0.2.7', 'fd00::/8']);

  it('is the connection’s own where no proxy is trusted, whatever the caller says', () => {
    expect(direct({ remoteAddress: '203.0.113.9', forwardedFor: '198.51.100.1' })).toBe('203.0.113.9');
    expect(direct({ remoteAddress: '10.0.0.1', forwardedFor: '198.51.100.1' })).toBe('10.0.0.1');
    expect(direct({ remoteAddress: '::ffff:203.0.113.9', forwardedFor: undefined })).toBe('203.0.113.9');
  });

  it.each([
    ['one proxy', '10.1.2.3', '198.51.100.1', '198.51.100.1'],
    ['proxies in a row', '10.1.2.3', '198.51.100.1, 192.0.2.7, 10.9.9.9', '198.51.100.1'],
    ['made-up hops before the true one', '10.1.2.3', '1.1.1.1, 10.0.0.1, 198.51.100.1', '198.51.100.1'],
    ['a connection past the proxies', '203.0.113.9', '198.51.100.1', '203.0.113.9'],
    ['a port', '10.1.2.3', '198.51.100.1:4711', '198.51.100.1'],
    ['nonsense from the proxy', '10.1.2.3', 'unknown', '10.1.2.3'],
    ['an empty header', '10.1.2.3', '', '10.1.2.3'],
    ['nothing but proxies', '10.1.2.3', '10.0.0.2', '10.0.0.2'],
    ['IPv6', 'fd00::1', '[2001:db8::1]:443', '2001:db8:0:0::/64'],
    ['IPv6 in brackets alone', 'fd00::1', '[2001:db8::1]', '2001:db8:0:0::/64'],
    ['IPv4 as sockets of IPv6 show it', '::ffff:10.1.2.3', '::FFFF:198.51.100.1', '198.51.100.1'],
    ['IPv4 within IPv6 by its groups', '::ffff:a01:203', '::ffff:c633:6401', '198.51.100.1'],
    ['IPv4 within IPv6, with a port', '10.1.2.3', '[::ffff:198.51.100.1]:4711', '198.51.100.1'],
    ['several headers', '10.1.2.3', ['1.1.1.1', '198.51.100.1, 10.9.9.9'], '198.51.100.1'],
  ])('is what trusted proxies tell: %s', (_, remoteAddress, forwardedFor, address) => {
    expect(behind({ remoteAddress, forwardedFor })).toBe(address);
  });

  it('is the same for all of one IPv6 subscriber, and another for the next', () => {
    const of = (remoteAddress: string) => direct({ remoteAddress, forwardedFor: undefined });
    expect(of('2001:db8:1:2::1')).toBe(of('2001:db8:1:2:ffff:aaaa:1:2'));
    expect(of('2001:0db8:0001:0002::1')).toBe(of('2001:db8:1:2::9'));
    expect(of('2001:db8:1:3::1')).not.toBe(of('2001:db8:1:2::1'));
    expect(of('::1')).toBe('0:0:0:0::/64');
    expect(of('::2:3:4:5:6:7:8')).toBe('0:2:3:4::/64');
    expect(of('2001:db8::3:4:5:6:7')).toBe('2001:db8:0:3::/64');
  });

  it('is not known where the connection has ended meanwhile', () => {
    expect(direct({ remoteAddress: undefined, forwardedFor: undefined })).toBe('unknown');
    expect(behind({ remoteAddress: undefined, forwardedFor: '198.51.100.1' })).toBe('unknown');
  });

  it('is told by every proxy of a network, however large, and by no other', () => {
    const half = createClientAddressOf(['128.0.0.0/1']);
    const of = (remoteAddress: string) => half({ remoteAddress, forwardedFor: '198.51.100.1' });
    expect([of('128.0.0.1'), of('127.0.0.1')]).toEqual(['198.51.100.1', '127.0.0.1']);
  });

  it('trusts nobody by mistake', () => {
    const networks = ['0.0.0.0/0', '::/0', '10.0.0.0/33', '10.0.0.0/8/8', '10.0.0.0/', '10.0.0.0/1e1'];
    for (const text of [...networks, '10.0.0', 'proxy.example', '']) {
      expect(() => createClientAddressOf([text]), text).toThrow('must list addresses or networks');
    }
  });
});
