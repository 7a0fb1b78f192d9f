/** Which load a test makes: by the options of the command line, or by a mix file. */
import { z } from 'zod';
import { ConfigError } from './config.ts';
import {
  BACKLOG_MAX,
  DEVICES_MAX,
  DURATION_MAX_MS,
  OPERATIONS_MAX,
  PARTS_MAX,
  type PartPlan,
  partOf,
  RATE_MAX_PER_SECOND,
  SCENARIO_NAMES,
} from './load-test/load-plan.ts';
import { scheduleOf } from './load-test/schedule.ts';
import { CONTENT_BYTES_MAX } from './protocol/limits.ts';
import { UsageError } from './usage-error.ts';

const UNIT_MS: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 };

const devices = z.int().min(1).max(DEVICES_MAX);
const rate = z.number().positive().max(RATE_MAX_PER_SECOND);
const contentBytes = z.int().min(1).max(CONTENT_BYTES_MAX);
const backlog = z.int().min(1).max(BACKLOG_MAX);
const time = z.string().transform((text, context) => {
  const [, count, unit] = /^(\d{1,9})(ms|s|m|h)$/.exec(text) ?? [];
  const timeMs = Number(count) * (UNIT_MS[unit ?? ''] ?? Number.NaN);
  if (timeMs <= DURATION_MAX_MS) return timeMs;
  context.addIssue({
    code: 'custom',
    message: 'must be a time such as 500ms, 30s, 5m or 1h, of at most a day',
  });
  return z.NEVER;
});
const duration = time.refine((timeMs) => timeMs > 0, 'must be longer than nothing');

const mixFile = z.strictObject({
  parts: z
    .array(
      z.strictObject({
        scenario: z.enum(SCENARIO_NAMES),
        name: z
          .string()
          .regex(/^[\w .-]{1,40}$/, 'must be of at most 40 letters, digits, spaces, dots, - and _')
          .optional(),
        devices: devices.optional(),
        rate: rate.optional(),
        duration: duration.optional(),
        delay: time.optional(),
        contentBytes: contentBytes.optional(),
        backlog: backlog.optional(),
        pq: z.boolean().optional(),
      }),
    )
    .min(1)
    .max(PARTS_MAX),
});

/** Options as typed, without their dashes. */
export interface LoadOptions {
  scenario?: string | undefined;
  devices?: string | undefined;
  rate?: string | undefined;
  duration?: string | undefined;
  'content-bytes'?: string | undefined;
  backlog?: string | undefined;
  pq?: boolean | undefined;
}

/** As people write numbers, and no other form that JavaScript reads. */
const typedNumber = z
  .string()
  .regex(/^\d{1,15}(\.\d{1,15})?$/, 'must be a number')
  .transform(Number);

const typedOptions = z.object({
  scenario: z.enum(SCENARIO_NAMES).default('chat'),
  devices: typedNumber.pipe(devices).optional(),
  rate: typedNumber.pipe(rate).optional(),
  duration: duration.optional(),
  'content-bytes': typedNumber.pipe(contentBytes).optional(),
  backlog: typedNumber.pipe(backlog).optional(),
  pq: z.boolean().optional(),
});

/** @throws UsageError */
export function partFromOptions(options: LoadOptions): PartPlan {
  const given = parsedOptions(options);
  const part = withDefaults(given.scenario, {
    deviceCount: given.devices,
    ratePerSecond: given.rate,
    durationMs: given.duration,
    contentBytes: given['content-bytes'],
    backlogLength: given.backlog,
    hasPq: given.pq,
  });
  for (const fault of [tooFewDevices(part), tooManyOperations([part])]) {
    if (fault !== null) throw new UsageError(fault);
  }
  return part;
}

function parsedOptions(options: LoadOptions) {
  const parsed = typedOptions.safeParse(options);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw new UsageError(`--${issue?.path.join('.')}: ${issue?.message}`);
}

/**
 * Reads a mix file.
 *
 * @param file.duration as typed, of each part that tells none
 * @throws ConfigError with one line for each fault; UsageError
 */
export function partsFromMix(file: {
  name: string;
  text: string;
  duration?: string | undefined;
}): PartPlan[] {
  const durationMs = parsedOptions({ duration: file.duration }).duration;
  let json: unknown;
  try {
    json = JSON.parse(file.text);
  } catch (error) {
    throw new ConfigError([`${file.name}: is no JSON: ${error instanceof Error ? error.message : error}`]);
  }
  const parsed = mixFile.safeParse(json);
  if (!parsed.success) {
    throw new ConfigError(
      parsed.error.issues.map(({ path, message }) => `${file.name}: ${placeOf(path)}${message}`),
    );
  }
  const parts = parsed.data.parts.map((given) =>
    withDefaults(given.scenario, {
      name: given.name,
      deviceCount: given.devices,
      ratePerSecond: given.rate,
      durationMs: given.duration ?? durationMs,
      delayMs: given.delay,
      contentBytes: given.contentBytes,
      backlogLength: given.backlog,
      hasPq: given.pq,
    }),
  );
  const faults: string[] = [];
  parts.forEach((part, index) => {
    const fault = tooFewDevices(part);
    if (fault !== null) faults.push(`${file.name}: parts[${index}]: ${fault}`);
  });
  const fault = tooManyOperations(parts);
  if (fault !== null) faults.push(`${file.name}: ${fault}`);
  const names = parts.map(({ name }) => name);
  names.forEach((name, index) => {
    if (names.indexOf(name) < index) {
      faults.push(`${file.name}: parts[${index}]: a second part is called ${name}; give it another name`);
    }
  });
  const deviceCount = parts.reduce((sum, part) => sum + part.deviceCount, 0);
  if (deviceCount > DEVICES_MAX)
    faults.push(`${file.name}: has ${deviceCount} devices; ${DEVICES_MAX} is most`);
  if (faults.length > 0) throw new ConfigError(faults);
  return parts;
}

function withDefaults(
  scenario: PartPlan['scenario'],
  given: { [Name in keyof Omit<PartPlan, 'scenario'>]?: PartPlan[Name] | undefined },
): PartPlan {
  const told = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  return partOf(scenario, told);
}

function tooFewDevices({ scenario, deviceCount }: PartPlan): string | null {
  return deviceCount < 2 && scenario !== 'connect' ? `${scenario} needs two devices at least` : null;
}

/** Parts run at once, and one process keeps the books of all. */
function tooManyOperations(parts: readonly PartPlan[]): string | null {
  let count = 0;
  for (const part of parts) {
    const messageCount = part.scenario === 'backlog' ? part.deviceCount * part.backlogLength : 0;
    count += Math.max(scheduleOf(part).count, messageCount);
  }
  if (count <= OPERATIONS_MAX) return null;
  return `${count} operations are more than one run can keep the books of; ${OPERATIONS_MAX} is most`;
}

function placeOf(path: PropertyKey[]): string {
  const place = path
    .map((step) => (typeof step === 'number' ? `[${step}]` : `.${String(step)}`))
    .join('')
    .replace(/^\./, '');
  return place === '' ? '' : `${place}: `;
}
