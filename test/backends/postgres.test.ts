// The stores on every PostgreSQL that this machine can start, held to the contracts of their ports.
import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { sql } from 'drizzle-orm';
import { afterAll } from 'vitest';
import {
  type Database,
  migrateDatabase,
  openDatabase,
  type PostgresAddress,
} from '../../src/backends/postgres/database.ts';
import { startEmbeddedPostgres } from '../../src/backends/postgres/embedded.ts';
import { createKeyStore } from '../../src/backends/postgres/key-store.ts';
import { createMessageStore } from '../../src/backends/postgres/message-store.ts';
import { systemClock } from '../../src/lib/clock.ts';
import { silentLog } from '../../src/lib/log.ts';
import { describeKeyStore } from '../contract/key-store.ts';
import { describeMessageStore } from '../contract/message-store.ts';
import { createDatabase, startPostgres } from '../support/engines.ts';

interface OpenEngine {
  address: PostgresAddress;
  stop(): Promise<void>;
}

const engines: { started: string; open(): Promise<OpenEngine> }[] = [
  {
    started: 'of the run, by URL',
    async open() {
      const { url, drop } = await createDatabase();
      return { address: { kind: 'url', url }, stop: drop };
    },
  },
  {
    // Where the system has none, it is the npm packages' once more: the version in the name tells.
    started: 'the system’s first, by URL',
    async open() {
      const engine = await startPostgres({ prefer: 'system' });
      return { address: { kind: 'url', url: engine.url }, stop: () => engine.stop() };
    },
  },
  {
    started: 'started by the gateway, by its socket',
    async open() {
      const dataDir = await mkdtemp(join(tmpdir(), 'keygate-contract-'));
      const engine = await startEmbeddedPostgres({ dataDir, log: silentLog });
      return {
        address: { kind: 'socket', ...engine },
        async stop() {
          await engine.stop();
          await rm(dataDir, { recursive: true, force: true });
        },
      };
    },
  },
];

for (const { started, open } of engines) {
  const { address, stop } = await open();
  await migrateDatabase(address);
  const nodes = [openNode(address), openNode(address)] as const;
  const engine = `PostgreSQL ${await nodes[0].version()}, ${started}`;
  afterAll(async () => {
    await Promise.all(nodes.map((node) => node.database.close()));
    await stop();
  });

  describeKeyStore(engine, async () => ({
    keys: createKeyStore(nodes[0].database),
    otherNode: createKeyStore(nodes[1].database),
    close: async () => {},
  }));

  describeMessageStore(engine, async () => ({
    messages: createMessageStore(nodes[0].database),
    otherNode: createMessageStore(nodes[1].database),
    keys: createKeyStore(nodes[0].database),
    dyingAfterCopy: createMessageStore(
      dyingBefore(/^\s*DELETE FROM "messages"\s+WHERE ctid/, nodes[0].database),
    ),
    close: async () => {},
  }));
}

/** A database whose process dies before a statement like this one reaches it. */
function dyingBefore(statementLike: RegExp, database: Database): Database {
  return {
    ...database,
    hot: async (statement, values) => {
      if (statementLike.test(statement.text)) throw new Error('died');
      return await database.hot(statement, values);
    },
  };
}

function openNode(address: PostgresAddress) {
  const database = openDatabase({ address, clock: systemClock, log: silentLog });
  return {
    database,
    async version(): Promise<string> {
      const [row] = await database.run((db) =>
        db.execute<{ server_version: string }>(sql`SHOW server_version`),
      );
      return row!.server_version.split(' ')[0]!;
    },
  };
}
