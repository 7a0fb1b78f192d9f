/** What every contestant has in common, and the runs that it leaves behind. */
import type { Latency, Timing } from './load/measurement.ts';
import { DIST_DIR, type Stage } from './stage.ts';

export interface Turn extends Timing {
  /** As fast as it can, by whoever keeps a pace otherwise. */
  isUnpaced?: boolean;
}

/** One contestant in one round. */
export interface Run {
  perSecond: number;
  /** Null where the contestant tells none. */
  latencyMs: Latency | null;
  /** Processor time for one operation, by process. */
  cpuPerOperationUs: Record<string, number>;
  /** How much of one core the load process had; null where the contestant brings its own load. */
  loadShare: number | null;
  /** How busy the server's event loop was; null where there is none. */
  loopShare: number | null;
  /** How much of the machine processes had that are no part of the bench, over the whole turn. */
  othersShare: number;
  /** What went wrong or differs from what was expected, in words; empty in a good run. */
  remarks: string[];
}

/** A run as the contestant itself can tell it. */
export type OwnRun = Omit<Run, 'othersShare'>;

export interface Contestant {
  name: string;
  /** One line for the report. */
  what: string;
  /** What one operation is. */
  operation: string;
  /** Whether a gateway of this build is what is measured. */
  isGateway: boolean;
  /** Brings the store back to where every round begins. */
  reset(): Promise<void>;
  run(turn: Turn): Promise<OwnRun>;
  /** Writes a processor profile of the server over one run. */
  profile?(timing: Timing, file: string): Promise<void>;
}

/** Devices that are claimed from, and the one-time prekeys of each. */
export interface Pools {
  devices: number;
  perDevice: number;
}

export interface Scale {
  sockets: number;
  /** No turn is expected to claim more: the pools have as much. */
  claimsMax: number;
  pools: Pools;
  /** Many prekeys for each device. */
  deepPools: Pools;
  /** Many devices. */
  manyPools: Pools;
  /** Messages that wait for one device. */
  backlog: number;
}

/** A gateway that is measured beside this one. */
export interface OtherBuild {
  /** What stands behind the names of its contestants: `gateway-other-1`. */
  label: string;
  distDir: string;
  note: string;
}

/** Which gateway a contestant measures, and what it is called. */
export type Build = Pick<Contestant, 'name' | 'what' | 'isGateway'> & { distDir: string };

/** A contestant with a gateway of its own, which may be of another build. */
export interface Kind {
  name: string;
  what: string;
  make(stage: Stage, scale: Scale, build: Build): Promise<Contestant>;
}

/** Of this build. */
export function companyOf({ name, what, make }: Kind): Company {
  return {
    names: [name],
    make: async (stage, scale) => [
      await make(stage, scale, { name, what, distDir: DIST_DIR, isGateway: true }),
    ],
  };
}

/** The same of another build. */
export function otherCompanyOf({ name, what, make }: Kind, { label, distDir, note }: OtherBuild): Company {
  const build = { name: `${name}-${label}`, what: `${what}, ${note}`, distDir, isGateway: false };
  return {
    names: [build.name],
    make: async (stage, scale) => [await make(stage, scale, build)],
  };
}

/** Contestants that share their servers. */
export interface Company {
  names: readonly string[];
  /** Makes all of them, in the order of their names. */
  make(stage: Stage, scale: Scale): Promise<Contestant[]>;
}
