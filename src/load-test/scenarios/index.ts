/** Every scenario by its name, and the steps that it measures. */
import type { ScenarioName } from '../load-plan.ts';
import { createBacklog } from './backlog.ts';
import { createChat } from './chat.ts';
import { createClaims } from './claims.ts';
import { createConnect } from './connect.ts';
import type { Scenario, Stage } from './scenario.ts';
import { createSlowReaders } from './slow-readers.ts';
import { createStorm } from './storm.ts';

interface ScenarioKind {
  /** In the order of the report; the last one ends an operation. */
  steps: readonly string[];
  create(stage: Stage): Scenario;
}

export const scenarioKinds: Readonly<Record<ScenarioName, ScenarioKind>> = {
  connect: { steps: ['connected'], create: createConnect },
  claims: { steps: ['claimed'], create: createClaims },
  chat: { steps: ['stored', 'delivered'], create: createChat },
  backlog: { steps: ['first message', 'drained'], create: createBacklog },
  storm: { steps: ['connected', 'served again'], create: createStorm },
  'slow-readers': {
    steps: ['stored', 'delivered to slow readers', 'delivered to the others'],
    create: createSlowReaders,
  },
};
