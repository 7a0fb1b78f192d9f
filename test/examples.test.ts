/** What the README tells a newcomer to run, run as it stands there. */
import { spawn } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { mkdir, rm, writeFile } from 'node:fs/promises';
import { expect, it } from 'vitest';
import { undoAfterEach } from './support/flow.ts';
import { startGateway } from './support/gateway.ts';

const undo = undoAfterEach();

it('the script of the README lets two clients chat', async () => {
  const [, script] = /```js\n(\/\/ node chat\.mjs .*?)```/s.exec(readFileSync('README.md', 'utf8')) ?? [];
  expect(script, 'the README holds the script').toContain("from 'socket.io-client'");
  const gateway = await startGateway();
  undo.push(() => gateway.stop());
  // Inside the project, so that it finds socket.io-client as a newcomer's does.
  await mkdir('test-output', { recursive: true });
  const file = 'test-output/chat-of-the-readme.mjs';
  await writeFile(file, script!);
  undo.push(() => rm(file));
  const tokens = await Promise.all(['alice', 'bob'].map((userId) => gateway.token({ userId, deviceId: 1 })));
  const run = () =>
    new Promise<{ code: number | null; lines: string[] }>((resolve) => {
      const child = spawn(process.execPath, [file, ...tokens, gateway.url], {
        stdio: ['ignore', 'pipe', 'pipe'],
      });
      let said = '';
      for (const stream of [child.stdout, child.stderr]) {
        stream.setEncoding('utf8').on('data', (chunk: string) => {
          said += chunk;
        });
      }
      child.on('close', (code) => resolve({ code, lines: said.trim().split('\n') }));
    });
  const told = [
    'bob    uploads his public keys, and goes away',
    "alice  gets the one-time prekey 1 of bob's device 1",
    'alice  sends; the gateway keeps ciphertext until bob has proven his keys',
    'bob    comes back; his keys are in step',
    'bob    reads of alice: hello, bob',
    'bob    has read everything',
  ];
  expect(await run()).toEqual({ code: 0, lines: told });
  // And the README shows what it really prints.
  expect(readFileSync('README.md', 'utf8')).toContain(told.join('\n'));
  // Again: new installations of both, on the same store.
  expect(await run()).toMatchObject({ code: 0 });
});
