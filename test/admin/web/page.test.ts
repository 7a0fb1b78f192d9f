/**
 * The inspector's page in a real headless Chromium, over two real gateways that share a store and Redis, with real
 * libsignal devices as those who are looked at. What it looks like is left in test-output/inspector.
 */
import { randomUUID } from 'node:crypto';
import { mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import type { Browser, Locator, Page } from 'playwright-core';
import type { Socket } from 'socket.io-client';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { addressKey, type DeviceAddress } from '../../../src/protocol/ids.ts';
import type { AdminAnswer } from '../../../src/protocol/inspector/admin-api.ts';
import type { DiagnosisKind } from '../../../src/protocol/inspector/diagnosis.ts';
import { streamEvent } from '../../../src/protocol/inspector/events.ts';
import { launchChromium } from '../../support/chromium.ts';
import { redisUrl } from '../../support/engines.ts';
import { eventually } from '../../support/eventually.ts';
import { FEW_KEYS, hold, opened, someone } from '../../support/flow.ts';
import {
  connectClient,
  enrol,
  type Party,
  send,
  startGateway,
  type TestGateway,
} from '../../support/gateway.ts';
import { ADMIN_TOKEN, login, WITH_INSPECTOR } from '../../support/inspector.ts';
import { SignalDevice } from '../../support/libsignal-device.ts';

const PICTURES = join('test-output', 'inspector');
const WIDE = { width: 1600, height: 1000 };
const NARROW = { width: 400, height: 800 };

let here: TestGateway;
let there: TestGateway;
let browser: Browser;
let page: Page;
const faults: string[] = [];
const foreign: string[] = [];

beforeAll(async () => {
  mkdirSync(PICTURES, { recursive: true });
  const env = { ...WITH_INSPECTOR, ADMIN_WRITE: 'true' };
  // No sweep makes good what is shown to be stuck.
  const timing = { sweepPeriodMs: 3_600_000 };
  here = await startGateway({ redisUrl: redisUrl(), env, timing });
  there = await startGateway({ redisUrl: redisUrl(), env, databaseUrl: here.databaseUrl });
  browser = await launchChromium();
  page = await openPage();
  await logIn();
});
afterAll(async () => {
  await browser?.close();
  await there?.stop();
  await here?.stop();
});
afterEach(() => {
  expect(faults.splice(0)).toEqual([]);
  expect(foreign.splice(0)).toEqual([]);
});

async function logIn(): Promise<void> {
  await page.getByLabel('Admin token').fill(ADMIN_TOKEN);
  await page.getByRole('button', { name: 'Log in' }).click();
  await page.getByRole('navigation', { name: 'Views' }).waitFor();
}

/** A page that tells of every fault, and can reach nothing but loopback. */
async function openPage(): Promise<Page> {
  // The browser's own default, where the environment names no language, is one that Intl refuses.
  const opened = await browser.newPage({ locale: 'en-GB', viewport: WIDE, acceptDownloads: true });
  opened.setDefaultTimeout(10_000);
  opened.on('pageerror', (error) => faults.push(error.message));
  // Fails what runs in the page, as its own errors do.
  await opened.addInitScript(
    `addEventListener('securitypolicyviolation', (event) => {
      throw new Error('forbidden by the policy: ' + event.violatedDirective + ' ' + event.blockedURI);
    });`,
  );
  await opened.route(
    ({ hostname, protocol }) => hostname !== '127.0.0.1' && protocol !== 'blob:',
    (route) => {
      foreign.push(route.request().url());
      return route.abort();
    },
  );
  await opened.goto(here.adminUrl);
  return opened;
}

/** Resolves when what matches is shown from now on, wherever it happens. */
async function showing(filter: string): Promise<void> {
  // The note is drawn together with the state of the new line, or before it.
  await rows()
    .filter({ hasText: `From here on: ${filter}.` })
    .waitFor();
  await page.locator('.status').getByText('live', { exact: true }).waitFor();
}

async function goTo(address: string): Promise<void> {
  await page.evaluate(`location.hash = ${JSON.stringify(address)}`);
}

const rows = (): Locator => page.locator('.grid-events .row');
const listedCount = async (): Promise<number> =>
  Number((await page.getByTestId('kept').textContent())!.replaceAll(/\D/g, ''));

/** Someone who is called so, for what is seen to be told apart. */
const named = (name: string, deviceId = 1): DeviceAddress => ({
  userId: `${name}-${randomUUID().slice(0, 8)}`,
  deviceId,
});

/** Claims a bundle where there is no session, encrypts, and sends. @returns the message id */
async function say(from: Party, to: Party, text: string): Promise<string> {
  const { userId, deviceId } = to.address;
  if (!sessions.has(`${addressKey(from.address)} ${addressKey(to.address)}`)) {
    const { devices } = await from.client.call('requestBundle', { claimId: randomUUID(), userId, deviceId });
    await from.device.establishSession({ userId, ...devices[0]! });
    sessions.add(`${addressKey(from.address)} ${addressKey(to.address)}`);
    sessions.add(`${addressKey(to.address)} ${addressKey(from.address)}`);
  }
  const messageId = randomUUID();
  const envelope = await from.device.encrypt(to.address, text);
  await from.client.call('sendMessages', { messageId, userId, envelopes: [envelope] });
  return messageId;
}
const sessions = new Set<string>();

/** What a party was handed, decrypted. */
async function heard(party: Party): Promise<string[]> {
  const texts: string[] = [];
  for (const envelope of party.client.envelopes.splice(0)) {
    if (envelope.kind === 'message') texts.push(await party.device.decrypt(envelope));
  }
  return texts;
}

describe('who may look', () => {
  it('is let out, asked for the token, told why it is refused, and let in', async () => {
    await page.getByRole('button', { name: 'Log out' }).click();
    await page.getByLabel('Admin token').waitFor();
    await page.reload();
    await page.getByLabel('Admin token').fill('not the token of this gateway');
    await page.keyboard.press('Enter');
    await page.getByRole('alert').waitFor();
    expect(await page.getByRole('alert').textContent()).toMatch(/token/i);
    expect(await page.evaluate<number>(`fetch('/api/session').then(({ status }) => status)`)).toBe(401);
    await logIn();
  });
});

describe('live events', () => {
  let alice: Party;
  let bob: Party;
  beforeAll(async () => {
    await goTo('#/events');
    await page.getByText('Nothing has happened yet.').waitFor();
    // One on each node.
    alice = await opened(here, named('alice'));
    bob = await opened(there, named('bob'));
  });
  afterAll(async () => {
    alice.client.close();
    bob.client.close();
    await goTo('#/events');
    await page.getByRole('button', { name: 'Clear', exact: true }).click();
  });

  it('show two devices chat over two nodes, each step on its node, and never what they say', async () => {
    await say(alice, bob, 'is anybody there?');
    await eventually(async () => expect(await heard(bob)).toEqual(['is anybody there?']));
    await say(bob, alice, 'yes, and nobody else can read this');
    await eventually(async () => expect(await heard(alice)).toEqual(['yes, and nobody else can read this']));
    for (const name of [
      'sendMessages',
      'message stored',
      'message pushed',
      'message acknowledged',
      'claim',
    ]) {
      await rows().filter({ hasText: name }).first().waitFor();
    }
    const nodes = new Set(await page.locator('.grid-events .row .col-node').allTextContents());
    nodes.delete('');
    expect(nodes.size).toBe(2);

    await rows().filter({ hasText: 'sendMessages' }).first().click();
    const detail = page.getByRole('complementary', { name: 'Detail' });
    const text = await detail.textContent();
    expect(text).toContain(addressKey(alice.address));
    expect(text).toMatch(/content\s*‹[\d.]+ (?:B|KiB) #[0-9a-f]+›/);
    expect(await page.content()).not.toContain('is anybody there');
    await page.keyboard.press('Escape');
    expect(await detail.count()).toBe(0);
  });

  it('are filtered by the server, and the address says how', async () => {
    await page.keyboard.press('/');
    await page.keyboard.type(addressKey(bob.address));
    await page.keyboard.press('Enter');
    await page.getByText('Event', { exact: true }).and(page.locator('summary')).click();
    await page.getByRole('checkbox', { name: 'keyStatus', exact: true }).check();
    await page.keyboard.press('Escape');
    await eventually(() =>
      expect(page.url()).toContain(`#/events?device=${addressKey(bob.address)}&event=keyStatus`),
    );
    await showing(`device ${addressKey(bob.address)}, event keyStatus`);
    await alice.client.call('keyStatus');
    await bob.client.call('keyStats');
    await bob.client.call('keyStatus');
    await page.locator('.grid-events .row:not(.is-note)').first().waitFor();
    const devices = new Set(
      await page.locator('.grid-events .row:not(.is-note) .col-device').allTextContents(),
    );
    expect([...devices]).toEqual([addressKey(bob.address)]);
    expect(await page.locator('.grid-events .row .col-event').allTextContents()).not.toContain('keyStats');

    await page.getByRole('button', { name: 'Clear filter' }).click();
    await eventually(() => expect(new URL(page.url()).hash).toBe('#/events'));
    // A filter that makes no sense is refused in a sentence.
    await goTo('#/events?event=nonsense');
    expect(await page.getByRole('alert').textContent()).toContain('event');
    await goTo('#/events');
    await showing('everything');
  });

  it('stand still while paused, and go on with what came meanwhile', async () => {
    await page.locator('.grid-events').focus();
    await page.keyboard.press(' ');
    await page.getByRole('button', { name: 'Go on' }).waitFor();
    const before = await listedCount();
    for (let i = 0; i < 5; i++) await alice.client.call('keyStatus');
    await page.getByText(/[5-9] events waiting/).waitFor();
    expect(await listedCount()).toBe(before);
    await page.keyboard.press(' ');
    await eventually(async () => expect(await listedCount()).toBeGreaterThanOrEqual(before + 5));
  });

  it('are exported, one a line', async () => {
    const downloading = page.waitForEvent('download');
    await page.getByRole('button', { name: 'Export' }).click();
    const download = await downloading;
    expect(download.suggestedFilename()).toMatch(/^keygate-events-.*\.ndjson$/);
    const lines = readFileSync(await download.path(), 'utf8')
      .trimEnd()
      .split('\n');
    const events = lines.map((line) => streamEvent.parse(JSON.parse(line)));
    expect(events.length).toBeGreaterThan(5);
    expect(new Set(events.map(({ node }) => node)).size).toBe(2);
  });

  it('are walked by keys, and two of them compared', async () => {
    await page.getByRole('button', { name: 'Clear', exact: true }).click();
    // Requests that no test before has made: what those made may still come.
    await alice.client.call('keyStats');
    await alice.client.call('checkPreKeys');
    await rows().filter({ hasText: 'checkPreKeys' }).waitFor();
    await rows().filter({ hasText: 'keyStats' }).last().click();
    await page.keyboard.press('c');
    await page.keyboard.press('j');
    await page.getByRole('table', { name: 'Difference of two events' }).waitFor();
    const changed = page.locator('.difference tr.is-changed').filter({ hasText: 'event' });
    expect(await changed.first().textContent()).toMatch(/keyStats.*checkPreKeys/);
    const grid = page.getByRole('grid', { name: 'Live events' });
    const active = await grid.getAttribute('aria-activedescendant');
    expect(await page.locator(`#${active}`).getAttribute('aria-selected')).toBe('true');
    await page.keyboard.press('Escape');
    await page.keyboard.press('Escape');
  });
});

interface Stuck {
  device: DeviceAddress;
  messageId?: string;
  /** What else the page must say. */
  says?: RegExp;
}

/** How a device comes to be told each diagnosis. */
const STUCK: Readonly<Record<DiagnosisKind, () => Promise<Stuck>>> = {
  neverUploaded: async () => ({ device: someone() }),
  async keysReset() {
    const { client, address } = await enrol(here, someone(), FEW_KEYS);
    await client.call('resetKeys', {});
    return { device: address, says: /no keys|reset/ };
  },
  async noSocket() {
    const [alice, bob] = [await opened(here), await enrol(here, someone(), FEW_KEYS)];
    await send(alice.client, bob, 'waits');
    bob.client.close();
    await bob.client.disconnected;
    return { device: bob.address, says: /1 envelope waits/ };
  },
  neverValidated: async () => ({ device: (await enrol(here, someone(), FEW_KEYS)).address }),
  async validatedOlderKeySet() {
    const { client, device, address } = await enrol(here, someone(), FEW_KEYS);
    await client.call('validateKeys', device.validateInput());
    const reinstalled = new SignalDevice(address);
    await client.call('uploadKeys', {
      ...reinstalled.uploadInput({ oneTimePreKeys: 1, pqOneTimePreKeys: 0 }),
      replaceIdentity: true,
    });
    return { device: address, says: /version 1.*2/ };
  },
  async notReady() {
    const { client, device, address } = await enrol(here, someone(), FEW_KEYS);
    await client.call('validateKeys', device.validateInput());
    return { device: address, says: /clientReady/ };
  },
  async tokenExpired() {
    const address = someone();
    await enrol(here, address, FEW_KEYS);
    await connectClient(here.url, await here.token(address, 1_500));
    return { device: address };
  },
  async windowFull() {
    const [alice, bob] = [await opened(here), await opened(here)];
    hold(bob.client);
    await Promise.all(Array.from({ length: 257 }, () => send(alice.client, bob, 'held')));
    return { device: bob.address, says: /256/ };
  },
  async slow() {
    const bob = await opened(here);
    const asking = bob.client.socket as unknown as Socket;
    (asking.io.engine.transport as unknown as { ws: { pause(): void } }).ws.pause();
    const viewer = await login(here.adminUrl);
    // The answer names fifty faults: it is the largest that so small a request gets.
    const bad = Object.fromEntries(Array.from({ length: 50 }, (_, i) => [`${i}`.padEnd(110, 'x'), 1]));
    await eventually(async () => {
      for (let i = 0; i < 100; i++) asking.emit('keyStatus', bad, () => {});
      const { body } = await viewer.get(`/api/devices/${addressKey(bob.address)}`);
      expect((body as unknown as AdminAnswer<'device'>).diagnoses[0]!.kind).toBe('slow');
    });
    return { device: bob.address, says: /KiB/ };
  },
  async notAcknowledged() {
    const [alice, bob] = [await opened(here), await opened(here)];
    hold(bob.client);
    await send(alice.client, bob, 'held');
    return { device: bob.address, says: /1 envelope was pushed/ };
  },
  async putOff() {
    const [alice, bob] = [await opened(here), await opened(here)];
    bob.client.onMessages = ({ envelopes }) => ({
      processed: [],
      failed: envelopes.map(({ id }) => ({ id, reason: 'temporary' })),
    });
    return { device: bob.address, messageId: await send(alice.client, bob, 'hard'), says: /temporary/ };
  },
  async otherNode() {
    const bob = await opened(there);
    return { device: bob.address, says: /is on node/ };
  },
  async bounced() {
    const [alice, bob] = [await enrol(here, someone(), FEW_KEYS), await enrol(here, someone(), FEW_KEYS)];
    const messageId = await send(alice.client, bob, 'lost');
    await bob.client.call('resetKeys', {});
    return { device: bob.address, messageId, says: /sent back to its sender/ };
  },
  async delivered() {
    const [alice, bob] = [await opened(here), await opened(here)];
    const messageId = await send(alice.client, bob, 'arrives');
    await eventually(() => expect(bob.client.envelopes).toHaveLength(1));
    return { device: bob.address, messageId, says: /processed/ };
  },
  neverStored: async () => ({ device: (await opened(here)).address, messageId: randomUUID() }),
  async onItsWay() {
    const bob = await opened(here);
    // A node that shares the store and not the bus: its poke reaches nobody, as one that is lost.
    const apart = await startGateway({ databaseUrl: here.databaseUrl });
    try {
      const alice = await opened(apart);
      await send(alice.client, bob, 'poke lost');
    } finally {
      await apart.stop();
    }
    return { device: bob.address, says: /nothing holds it up/ };
  },
  nothingPending: async () => ({ device: (await opened(here)).address }),
};

describe('why not delivered?', () => {
  it.each(Object.entries(STUCK) as [DiagnosisKind, () => Promise<Stuck>][])('%s', async (kind, arrange) => {
    const { device, messageId, says } = await arrange();
    await goTo(`#/devices/${addressKey(device)}${messageId === undefined ? '' : `?messageId=${messageId}`}`);
    await page.getByRole('heading', { name: addressKey(device), exact: true }).waitFor();
    const told = page.locator(`[data-kind="${kind}"]`).first();
    await told.waitFor();
    const text = (await told.textContent())!;
    if (says !== undefined) expect(text).toMatch(says);
    // With the next step to take.
    expect(text.length).toBeGreaterThan(60);
    // Another node's socket is told beside the reason, everything else first.
    if (kind !== 'otherNode') {
      expect(await page.locator('.diagnosis').getAttribute('data-kind')).toBe(kind);
      expect(text).toContain('Next step');
    }
  });
});

describe('sockets', () => {
  it('of both nodes are listed; one is disconnected only after a question', async () => {
    const [near, far] = [await opened(here, named('near')), await opened(there, named('far'))];
    await goTo('#/sockets');
    const sockets = page.locator('.grid-sockets .row');
    await sockets.filter({ hasText: addressKey(near.address) }).waitFor();
    const line = sockets.filter({ hasText: addressKey(far.address) });
    await line.locator('.col-gate').click();
    const detail = page.getByRole('complementary', { name: 'Detail' });
    expect(await line.locator('.col-pending').textContent()).toBe('0');
    expect(await detail.getByRole('list', { name: 'Gate history' }).textContent()).toMatch(
      /connected.*validated v1.*open v1/,
    );

    await detail.getByRole('button', { name: 'Disconnect…' }).click();
    await page.getByRole('dialog').getByRole('button', { name: 'Keep it' }).click();
    await far.client.call('keyStatus');
    await detail.getByRole('button', { name: 'Disconnect…' }).click();
    await page.getByRole('dialog').getByRole('button', { name: 'Disconnect' }).click();
    await far.client.disconnected;
    await eventually(async () => expect(await line.count()).toBe(0));
  });

  it('are found by device and gate, and the address says so', async () => {
    const validated = await enrol(here, named('half'), FEW_KEYS);
    await validated.client.call('validateKeys', validated.device.validateInput());
    await send((await opened(there)).client, validated, 'waits');
    await goTo('#/sockets?gate=validated');
    const sockets = page.locator('.grid-sockets .row');
    const line = sockets.filter({ hasText: addressKey(validated.address) });
    await line.waitFor();
    expect(await line.locator('.col-pending').textContent()).toBe('1');
    await page.getByRole('button', { name: 'open', exact: true }).click();
    await eventually(async () => expect(await sockets.filter({ hasText: 'half' }).count()).toBe(0));
    expect(page.url()).toContain('gate=open');
    await page.getByRole('textbox', { name: 'Device or user' }).fill('nobody-at-all');
    await page.keyboard.press('Enter');
    await page.getByText('No socket matches.').waitFor();
  });
});

describe('a message', () => {
  it('has its life told over all nodes', async () => {
    const [alice, bob] = [await opened(here, named('alice')), await opened(there, named('bob'))];
    await goTo(`#/events?device=${bob.address.userId}`);
    await showing(`device ${bob.address.userId}`);
    const messageId = await say(alice, bob, 'follow me');
    await rows().filter({ hasText: 'message acknowledged' }).last().waitFor();
    await goTo(`#/messages/${messageId}?recipient=${bob.address.userId}`);
    await page.locator('.stage-acknowledged').waitFor();
    const stages = await page.locator('.timeline .stage-what b').allTextContents();
    // The other node may have found it before the first one heard that it is stored.
    expect(stages.toSorted()).toEqual(['Acknowledged', 'Poked the serving node', 'Pushed', 'Stored']);
    expect(stages.at(-1)).toBe('Acknowledged');
    expect(new Set(await page.locator('.stage-node').allTextContents()).size).toBe(2);
    expect(await page.locator('.message-state').textContent()).toBe('delivered');
  });
});

describe('what it looks like', () => {
  it('is left in pictures, wide and narrow, light and dark, with nothing out of sight', async () => {
    const alice = await opened(here, named('alice'));
    const bob = await enrol(there, named('bob'), { oneTimePreKeys: 4, pqOneTimePreKeys: 2 });
    await bob.client.call('validateKeys', bob.device.validateInput());
    const carol = await opened(there, named('carol'));
    await goTo('#/events');
    await showing('everything');
    const messageId = await say(alice, carol, 'are you there?');
    for (let i = 0; i < 12; i++) {
      await say(alice, bob, `message ${i}`);
      await alice.client.call('keyStatus');
      await alice.client.ask('requestBundle', { claimId: randomUUID(), userId: 'nobody' });
    }
    await rows().filter({ hasText: 'requestBundle' }).last().waitFor();

    const pictures: [string, string, (() => Promise<unknown>)?][] = [
      ['overview', '#/overview', () => page.locator('.figures').waitFor()],
      ['events', '#/events', () => rows().first().waitFor()],
      ['event', '#/events', () => rows().filter({ hasText: 'sendMessages' }).last().click()],
      ['sockets', '#/sockets', () => page.locator('.grid-sockets .row').first().waitFor()],
      ['device', `#/devices/${addressKey(bob.address)}`, () => page.locator('.diagnosis').waitFor()],
      [
        'message',
        `#/messages/${messageId}?recipient=${carol.address.userId}`,
        () => page.locator('.cards').waitFor(),
      ],
    ];
    for (const colorScheme of ['light', 'dark'] as const) {
      await page.emulateMedia({ colorScheme });
      for (const viewport of [WIDE, NARROW]) {
        await page.setViewportSize(viewport);
        for (const [name, address, arrange] of pictures) {
          await goTo(address);
          await arrange?.();
          await page.screenshot({ path: join(PICTURES, `${name}-${viewport.width}-${colorScheme}.png`) });
          const widths = await page.evaluate<number[]>('[document.documentElement.scrollWidth, innerWidth]');
          expect(widths[0], `${name} at ${viewport.width}`).toBeLessThanOrEqual(widths[1]!);
          if (name === 'event') await page.keyboard.press('Escape');
        }
      }
    }
    await page.setViewportSize(WIDE);
    // A choice of the reader's outweighs the system's.
    const ground = () => page.evaluate<string>('getComputedStyle(document.body).backgroundColor');
    const dark = await ground();
    await page.getByRole('button', { name: 'Theme: system' }).click();
    expect(await ground()).not.toBe(dark);
  });
});
