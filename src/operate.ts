/** Commands for those who run gateways: they work on the configured store, beside running gateways or without any. */
import { answer, type Command, JSON_OPTION, progressBar, type Values } from './command.ts';
import type { Operator } from './compose.ts';
import { parseConfig } from './config.ts';
import { withdrawAfterRestore } from './keys/restored.ts';
import { systemClock } from './lib/clock.ts';

export const operatorCommands: Record<string, Command> = {
  restored: {
    summary: 'make a store safe to serve after a backup was restored into it',
    help: 'Usage: keygate restored [--json]\n\nTo be run once after a backup was restored, before the gateways are started again. In the time that was lost,\nkeys that the backup still offers may have been handed out. So every unclaimed one-time prekey is withdrawn for good,\nthe versions of every device rise beyond all that clients have seen, and every gate closes (serverRestored): each\nclient compares its keys, and uploads new one-time prekeys under new ids.\nSafe to be run again.\n\n  --json  print the counts as JSON',
    options: JSON_OPTION,
    run: restored,
  },
};

/** Runs `action` on the configured store, and closes it however it ends. */
async function withOperator(action: (operator: Operator) => Promise<void>): Promise<void> {
  const config = parseConfig(process.env);
  // Loaded only here: help and faults of usage are told without waiting for it.
  const { openOperator } = await import('./compose.ts');
  const operator = await openOperator(config);
  try {
    await action(operator);
  } finally {
    await operator.close();
  }
}

async function restored(values: Values): Promise<void> {
  await withOperator(async ({ maintenance }) => {
    const bar = progressBar('devices', await maintenance.countDevices());
    const { deviceCount, withdrawnCount } = await withdrawAfterRestore({
      maintenance,
      clock: systemClock,
      onBatch: (devices) => bar.advance(devices.length),
    }).finally(() => bar.end());
    answer(values, { deviceCount, withdrawnCount }, [
      `${withdrawnCount} unclaimed one-time prekeys of ${deviceCount} devices are withdrawn for good`,
      'open gates close within 15 seconds; each client compares its keys and uploads new ones when it comes back',
    ]);
  });
}
