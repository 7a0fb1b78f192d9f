/**
 * A gateway as `keygate serve` runs it, that gives up on lost nodes and finds lost pokes within seconds: the tests that
 * break nodes can't wait as long as production does. `NODE_TIMING` is what `createGateway` takes as timing, in JSON.
 */
import { createGateway } from '../../src/compose.ts';
import { parseConfig } from '../../src/config.ts';
import { createLogger } from '../../src/logger.ts';
import { endOnUncaught } from '../../src/uncaught.ts';

const { NODE_TIMING = '{}', ...env } = process.env;
const config = parseConfig(env);
const log = createLogger(config.logLevel);
endOnUncaught((error) => log.error({ error }, 'uncaught exception'));
const ordered = new Promise<void>((resolve) => process.once('SIGTERM', resolve));
const gateway = await createGateway(config, { log, timing: JSON.parse(NODE_TIMING) });
process.stdout.write(`  gateway  ${gateway.url}\n  health   ${gateway.adminUrl}/readyz\n`);
await ordered;
await gateway.stop();
process.exit(0);
