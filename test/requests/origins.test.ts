import { describe, expect, it } from 'vitest';
import { isOriginAllowed } from '../../src/requests/origins.ts';

const listed = { listed: ['https://chat.example.org', 'app://keygate'], loopback: false };
const loopback = { listed: [], loopback: true };

describe('origins', () => {
  it('allow a caller that names none, since no browser is behind it', () => {
    expect(isOriginAllowed(listed, undefined)).toBe(true);
    expect(isOriginAllowed({ listed: [], loopback: false }, undefined)).toBe(true);
  });

  it.each(['https://chat.example.org', 'app://keygate'])('allow %s where it is listed', (origin) => {
    expect(isOriginAllowed(listed, origin)).toBe(true);
    expect(isOriginAllowed(loopback, origin)).toBe(false);
  });

  it.each([
    'https://chat.example.org:8443',
    'http://chat.example.org',
    'https://evil.chat.example.org',
    'https://chat.example.org.evil.example',
    'https://CHAT.example.org',
    'https://chat.example.org/',
    'https://chat.example.org, https://chat.example.org',
    'null',
    '',
    '*',
  ])('refuse "%s", which is not what is listed', (origin) => {
    expect(isOriginAllowed(listed, origin)).toBe(false);
  });

  it.each([
    'http://localhost',
    'http://localhost:5173',
    'https://localhost:8443',
    'http://127.0.0.1:3000',
    'http://127.1.2.3',
    'http://[::1]',
    'http://[::1]:8080',
  ])('allow %s only where pages of this machine are allowed', (origin) => {
    expect(isOriginAllowed(loopback, origin)).toBe(true);
    expect(isOriginAllowed(listed, origin)).toBe(false);
  });

  it.each([
    'http://localhost.evil.example',
    'http://localhost@evil.example',
    'http://evil.example#localhost',
    'http://127.0.0.1.evil.example',
    'http://128.0.0.1',
    'http://127.1',
    'http://[::2]',
    'http://[::ffff:127.0.0.1]',
    'http://0.0.0.0',
    'http://localhost/',
    'ws://localhost',
    'file://localhost',
    'localhost',
    'null',
    '',
  ])('refuse "%s" as no page of this machine', (origin) => {
    expect(isOriginAllowed(loopback, origin)).toBe(false);
  });
});
