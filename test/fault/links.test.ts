/** Links between clients and gateways that are cut, slow or silent, and clients that stand still. */
import { describe } from 'vitest';
import {
  clientFrozen,
  clientsReadNothing,
  linkCutAfterBytes,
  linkCutAtEachStep,
  linkSilent,
  linkSlowAndNarrow,
} from './faults.ts';
import { onStage } from './suite.ts';

describe('the rules hold', () => {
  const over = onStage();
  over('when the link is cut at each step of claim, send, push and acknowledgement', () => linkCutAtEachStep);
  over('when every connection is cut after some thousand bytes', () => linkCutAfterBytes);
  over('when the link is slow and narrow', () => linkSlowAndNarrow);
  over('when the link carries nothing, both ways or one, and stays open', () => linkSilent);
  over('when clients read nothing', () => clientsReadNothing);
  over('when a client is frozen, and thaws', () => clientFrozen);
});
