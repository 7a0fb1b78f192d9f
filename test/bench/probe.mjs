/** Loaded beside a server that is measured: collects garbage, tells how busy its event loop was, and profiles it. */
import { writeFileSync } from 'node:fs';
import { Session } from 'node:inspector/promises';
import { performance } from 'node:perf_hooks';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc');
let loopAtStart = performance.eventLoopUtilization();
let session = null;

const functions = {
  collectGarbage() {
    collect();
    return process.memoryUsage();
  },
  startLoopWatch() {
    loopAtStart = performance.eventLoopUtilization();
  },
  loopUtilization() {
    return performance.eventLoopUtilization(loopAtStart).utilization;
  },
  async startProfile() {
    session = new Session();
    session.connect();
    await session.post('Profiler.enable');
    await session.post('Profiler.setSamplingInterval', { interval: 200 });
    await session.post('Profiler.start');
  },
  async stopProfile({ file }) {
    const { profile } = await session.post('Profiler.stop');
    session.disconnect();
    writeFileSync(file, JSON.stringify(profile));
  },
};

process.on('disconnect', () => process.exit(1));
process.on('message', async ({ id, name, input }) => {
  try {
    process.send({ id, result: await functions[name](input) });
  } catch (error) {
    process.send({ id, error: String(error) });
  }
});
process.channel?.unref();
