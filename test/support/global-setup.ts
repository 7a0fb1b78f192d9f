/** Gives the run its shared engines, unless the environment already names some; without them the run fails. */

import { findPgBouncer, MissingEngineError } from './debian-binary.ts';
import { type Engine, startPostgres, startRedis } from './engines.ts';
import { buildKeygate } from './program.ts';

/** The workers, and the processes that tests start, find the engines in the environment. */
export default async function setup(): Promise<() => Promise<void>> {
  buildKeygate();
  const engines: Engine[] = [];
  const share = async (name: string, start: () => Promise<Engine>): Promise<void> => {
    if (process.env[name]) return;
    const engine = await start();
    engines.push(engine);
    process.env[name] = engine.url;
  };
  try {
    await share('TEST_DATABASE_URL', startPostgres);
    await share('TEST_REDIS_URL', startRedis);
    // Downloaded here, where no test waits for it.
    await findPgBouncer();
  } catch (error) {
    if (!(error instanceof MissingEngineError)) throw error;
    // A stack would bury the one line that helps.
    process.stderr.write(`${error.message}\n`);
    process.exit(1);
  }
  return async () => {
    await Promise.all(engines.map((engine) => engine.stop()));
  };
}
