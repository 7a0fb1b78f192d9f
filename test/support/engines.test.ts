/** The tests' own engines: real ones, apart from each other, and gone with the run. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readFileSync } from 'node:fs';
import { Redis } from 'ioredis';
import postgres from 'postgres';
import { describe, expect, it } from 'vitest';
import { createDatabase, redisUrl, startPostgres, startRedis } from './engines.ts';
import { eventually } from './eventually.ts';

function commandOf(pid: number): string {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8').split('\0').join(' ');
  } catch {
    return '';
  }
}

async function ask(url: string, text: string): Promise<unknown[]> {
  const sql = postgres(url, { max: 1, onnotice: () => {} });
  return sql
    .unsafe(text)
    .then((rows) => [...rows])
    .finally(() => sql.end());
}

describe('createDatabase', () => {
  it('makes databases that know nothing of each other', async () => {
    const [one, other] = await Promise.all([createDatabase(), createDatabase()]);
    await ask(one.url, 'CREATE TABLE here AS SELECT 1 AS value');
    expect(await ask(one.url, 'SELECT value FROM here')).toEqual([{ value: 1 }]);
    await expect(ask(other.url, 'SELECT value FROM here')).rejects.toThrow(/does not exist/);
    await Promise.all([one.drop(), other.drop()]);
    await expect(ask(one.url, 'SELECT 1')).rejects.toThrow(/does not exist/);
  });
});

describe('startPostgres', () => {
  it('keeps its data over SIGKILL and restart, at the same address', async () => {
    const engine = await startPostgres();
    await ask(engine.url, 'CREATE TABLE kept AS SELECT 1 AS value');
    const pid = engine.pid;
    await engine.kill('SIGKILL');
    await expect(ask(engine.url, 'SELECT 1')).rejects.toThrow();
    await engine.restart();
    expect(engine.pid).not.toBe(pid);
    expect(await ask(engine.url, 'SELECT value FROM kept')).toEqual([{ value: 1 }]);
    await engine.stop();
    expect(commandOf(engine.pid)).toBe('');
  });

  it('flushes to the disk where a bench asks for it', async () => {
    const engine = await startPostgres({ durable: true, prefer: 'system' });
    expect(
      await ask(
        engine.url,
        `SELECT current_setting('fsync') AS f, current_setting('synchronous_commit') AS s`,
      ),
    ).toEqual([{ f: 'on', s: 'on' }]);
    await engine.stop();
  });
});

describe('startRedis', () => {
  it('starts a Redis of its own that restarts empty, or keeps its keys where asked to', async () => {
    for (const appendOnly of [false, true]) {
      const engine = await startRedis({ appendOnly });
      const first = new Redis(engine.url);
      await first.set('key', 'value');
      first.disconnect();
      await engine.kill('SIGKILL');
      await engine.restart();
      const second = new Redis(engine.url);
      expect(await second.get('key')).toBe(appendOnly ? 'value' : null);
      second.disconnect();
      await engine.stop();
    }
  });

  it('is beside a shared one with a database for each worker', async () => {
    const redis = new Redis(redisUrl());
    expect(await redis.ping()).toBe('PONG');
    redis.disconnect();
  });
});

describe('a run that is killed with SIGKILL', () => {
  it('leaves neither engines nor folders behind', async () => {
    const engines = new URL('./engines.ts', import.meta.url).href;
    const run = spawn(
      process.execPath,
      [
        ...['--import', 'tsx', '--input-type=module', '-e'],
        `const { startPostgres, startRedis } = await import(${JSON.stringify(engines)});
        const engines = [await startPostgres(), await startRedis()];
        process.stdout.write(JSON.stringify(engines.map(({ pid }) => pid)));
        process.stdin.resume();`,
      ],
      { stdio: ['pipe', 'pipe', 'inherit'] },
    );
    const pids: number[] = JSON.parse(String((await once(run.stdout, 'data'))[0]));
    const commands = pids.map(commandOf);
    expect(commands[0]).toContain('postgres -D');
    expect(commands[1]).toContain('redis');
    const folder = commands[0]!.match(/-D (\S+)\/postgres /)![1]!;
    run.kill('SIGKILL');
    await once(run, 'exit');
    await eventually(() => expect(pids.map(commandOf)).toEqual(['', '']), { that: 'the end of the engines' });
    await eventually(() => !existsSync(folder), { that: `the end of ${folder}` });
  });
});
