import { randomInt } from 'node:crypto';
import { createServer } from 'node:net';

/** Below the ports that systems give to whoever asks for any. */
const FIRST_PORT = 12_000;
const PORTS_OF_A_WORKER = 5_000;
const WORKERS = 4;

let next = randomInt(PORTS_OF_A_WORKER);

/**
 * A port that nothing listens on and that no other worker of the suite is given: it is still free when its owner, killed,
 * comes back. One that the system chose could be given away meanwhile.
 */
export async function freePort(): Promise<number> {
  const worker = Number(process.env.VITEST_POOL_ID ?? 0) % WORKERS;
  for (let attempt = 0; attempt < PORTS_OF_A_WORKER; attempt++) {
    next = (next + 1) % PORTS_OF_A_WORKER;
    const port = FIRST_PORT + worker * PORTS_OF_A_WORKER + next;
    if (await isFree(port)) return port;
  }
  throw new Error('every port of this worker is taken');
}

function isFree(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer();
    server.once('error', () => resolve(false));
    server.listen(port, () => server.close(() => resolve(true)));
  });
}
