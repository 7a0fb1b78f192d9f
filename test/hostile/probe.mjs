/** Loaded into a gateway under attack: watches memory and event loop, and writes both to a file when it is signalled. */
import { renameSync, writeFileSync } from 'node:fs';
import { monitorEventLoopDelay } from 'node:perf_hooks';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';

const SAMPLE_PERIOD_MS = 20;
const file = process.env.HOSTILE_FIGURES_FILE;

setFlagsFromString('--expose-gc');
const collect = runInNewContext('gc');
const delay = monitorEventLoopDelay({ resolution: SAMPLE_PERIOD_MS });
delay.enable();
let peakBytes = 0;
const sample = () => {
  peakBytes = Math.max(peakBytes, process.memoryUsage.rss());
};
setInterval(sample, SAMPLE_PERIOD_MS).unref();
const prototypesAtStart = names();

/** What a polluted prototype would have more of. */
function names() {
  return [Object.prototype, Array.prototype, Function.prototype]
    .flatMap((prototype) => Reflect.ownKeys(prototype).map(String))
    .sort()
    .join();
}

/** Starts a new period. */
process.on('SIGUSR2', () => {
  sample();
  const loopDelayMaxMs = Math.round(delay.max / 1e6);
  const peak = peakBytes;
  collect();
  // What buffers held is given back beside the program, and on a busy machine late: a second collection waits for it.
  collect();
  const { heapUsed, external } = process.memoryUsage();
  const figures = {
    peakBytes: peak,
    // What is left when the garbage is gone.
    heldBytes: heapUsed + external,
    loopDelayMaxMs,
    isPolluted: names() !== prototypesAtStart,
  };
  writeFileSync(`${file}.new`, JSON.stringify(figures));
  renameSync(`${file}.new`, file);
  peakBytes = 0;
  delay.reset();
});
