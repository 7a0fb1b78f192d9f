/** Redis and PostgreSQL that are killed, restarted, cut off, slow or silent. */
import { describe } from 'vitest';
import {
  postgresConnectionsCut,
  postgresKilled,
  postgresSlow,
  redisKilled,
  redisRestarted,
  redisSilent,
} from './faults.ts';
import { onStage } from './suite.ts';

describe('the rules hold', () => {
  const over = onStage();
  over('when Redis is killed, and comes back empty', () => redisKilled);
  over('when Redis is restarted again and again', () => redisRestarted);
  over('when Redis is silent', () => redisSilent);
  over('when PostgreSQL is killed, and restarts', () => postgresKilled);
  over('when connections to PostgreSQL are cut in the midst of transactions', () => postgresConnectionsCut);
  over('when PostgreSQL is slow', () => postgresSlow);
});
