/** What a load test is to do: its parts, and what each scenario does where nothing else is said. */

export const SCENARIO_NAMES = ['connect', 'claims', 'chat', 'backlog', 'storm', 'slow-readers'] as const;
export type ScenarioName = (typeof SCENARIO_NAMES)[number];

/** One scenario on devices of its own. Parts of one plan run at the same time. */
export interface PartPlan {
  /** Unique within the plan. */
  name: string;
  scenario: ScenarioName;
  deviceCount: number;
  /** Operations due per second; null stands for "all at once", which only a storm knows. */
  ratePerSecond: number | null;
  durationMs: number;
  /** How long after the first part it begins. */
  delayMs: number;
  /** Of one ciphertext. */
  contentBytes: number;
  /** Messages that wait for each device of `backlog`. */
  backlogLength: number;
  /** Whether devices have post-quantum prekeys too. */
  hasPq: boolean;
}

export interface LoadPlan {
  url: string;
  parts: PartPlan[];
}

interface ScenarioDefaults {
  /** One line, for the help. */
  summary: string;
  deviceCount: number;
  ratePerSecond: number | null;
  contentBytes: number;
}

export const SCENARIOS: Readonly<Record<ScenarioName, ScenarioDefaults>> = {
  connect: {
    summary: 'devices connect, one after the other, each ending its last connection first',
    deviceCount: 100,
    ratePerSecond: 50,
    contentBytes: 256,
  },
  claims: {
    summary: 'devices claim one-time prekeys of each other; owners refill when told that they run low',
    deviceCount: 100,
    ratePerSecond: 100,
    contentBytes: 256,
  },
  chat: {
    summary: 'each device sends to its neighbour: sent, stored, delivered, acknowledged',
    deviceCount: 100,
    ratePerSecond: 100,
    contentBytes: 256,
  },
  backlog: {
    summary: 'each device opens its gate once, on waiting messages, until its queue is empty',
    deviceCount: 100,
    ratePerSecond: 10,
    contentBytes: 256,
  },
  storm: {
    summary: 'every 10 s all connections are cut with messages in flight, and all devices come back',
    deviceCount: 200,
    ratePerSecond: null,
    contentBytes: 256,
  },
  'slow-readers': {
    summary: 'chat where a tenth of the devices reads in fits: do the others notice?',
    deviceCount: 100,
    ratePerSecond: 100,
    contentBytes: 1024,
  },
};

const DURATION_DEFAULT_MS = 30_000;
const BACKLOG_DEFAULT = 100;

/** What one process can hold, and keep the books of: some 700 bytes for a message. */
export const DEVICES_MAX = 20_000;
export const RATE_MAX_PER_SECOND = 100_000;
export const DURATION_MAX_MS = 24 * 3_600_000;
export const OPERATIONS_MAX = 2_000_000;
export const PARTS_MAX = 16;
export const BACKLOG_MAX = 10_000;

/** What the caller leaves out is the scenario's default. */
export function partOf(scenario: ScenarioName, given: Partial<Omit<PartPlan, 'scenario'>> = {}): PartPlan {
  const { deviceCount, ratePerSecond, contentBytes } = SCENARIOS[scenario];
  return {
    name: scenario,
    deviceCount,
    ratePerSecond,
    durationMs: DURATION_DEFAULT_MS,
    delayMs: 0,
    contentBytes,
    backlogLength: BACKLOG_DEFAULT,
    hasPq: false,
    ...given,
    scenario,
  };
}
