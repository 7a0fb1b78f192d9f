/** DATABASE_URL and REDIS_URL: what may stand in them. Told without their text, which holds passwords. */
import { z } from 'zod';

/** A comma among the hosts of any URL. */
const SEVERAL_HOSTS = /^[^:]*:\/\/(?:[^/?#]*@)?[^@/?#]*,[^@/?#]*(?:[/?#]|$)/;

/** Credentials, hosts with their ports, and what ioredis takes besides. */
const REDIS_HOSTS =
  /^[^:]*:\/\/(?:[^@\s/]*@)?(?:\[[\da-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?(?:,(?:\[[\da-fA-F:.]+\]|[\w.-]+)(?::\d{1,5})?)*(?:[/?]\S*)?$/;

/** ioredis takes whatever else stands there for an option of its own, and puts it above those that it is given. */
const REDIS_PARAMETERS: ReadonlySet<string> = new Set(['cluster', 'db', 'family']);

const OF_ANOTHER_CLIENT = 'another client of PostgreSQL understands and this one does not';

/** What stands in URLs that were made for other clients: PostgreSQL would refuse it without saying where it came from. */
const FOREIGN_PARAMETERS: Readonly<Record<string, string>> = {
  channel_binding: OF_ANOTHER_CLIENT,
  gssencmode: OF_ANOTHER_CLIENT,
  keepalives: OF_ANOTHER_CLIENT,
  keepalives_idle: OF_ANOTHER_CLIENT,
  keepalives_interval: OF_ANOTHER_CLIENT,
  keepalives_count: OF_ANOTHER_CLIENT,
  tcp_user_timeout: OF_ANOTHER_CLIENT,
  pgbouncer: OF_ANOTHER_CLIENT,
  connection_limit: OF_ANOTHER_CLIENT,
  pool_timeout: OF_ANOTHER_CLIENT,
  schema: OF_ANOTHER_CLIENT,
  sslcert: OF_ANOTHER_CLIENT,
  sslkey: OF_ANOTHER_CLIENT,
  sslrootcert: 'NODE_EXTRA_CA_CERTS stands for here',
  target_session_attrs: 'is of use with several hosts only, and one is to be named here',
};
/** The authorities of the system, which are asked anyway. */
const SYSTEM_AUTHORITIES = 'system';

/** One PostgreSQL, with what the driver takes besides. */
export function databaseUrl() {
  return (
    z
      .string()
      .regex(/^postgres(ql)?:\/\/\S+$/, {
        error: 'must begin with postgres:// or postgresql://',
        abort: true,
      })
      // The driver would go from one to the next without a pause, for as long as none of them is the primary.
      .refine((url) => !SEVERAL_HOSTS.test(url), {
        error: 'must name one host: an address, a name or a proxy that leads to the primary',
        abort: true,
      })
      .refine(URL.canParse, {
        error: 'is no URL: in a password, write # as %23, / as %2F, ? as %3F and @ as %40',
        abort: true,
      })
      .refine(
        (url) => areSwitches(new URL(url).searchParams, 'prepare'),
        'may say ?prepare=true or ?prepare=false, nothing else of prepare',
      )
      .superRefine((url, context) => {
        for (const [name, value] of new URL(url).searchParams) {
          const advice = FOREIGN_PARAMETERS[name];
          if (advice !== undefined && value !== SYSTEM_AUTHORITIES)
            context.addIssue(`must not have ${name}, which ${advice}: take it out`);
        }
      })
  );
}

/** One Redis, or nodes of a Cluster. */
export function redisUrl() {
  return z
    .string()
    .regex(/^rediss?:\/\/\S+$/, { error: 'must begin with redis:// or rediss://', abort: true })
    .regex(REDIS_HOSTS, {
      error: 'must name a host, or several separated by commas, as in redis://one:6379,two:6379',
      abort: true,
    })
    .superRefine((url, context) => {
      const fault = redisPathFault(url);
      if (fault !== null) context.addIssue(fault);
    });
}

/** Whether `name`, as often as it is given, is `true` or `false`. */
function areSwitches(query: URLSearchParams, name: string): boolean {
  return query.getAll(name).every((value) => value === 'true' || value === 'false');
}

/** What comes after the hosts: a database and a query. The text of a fault repeats none of it. */
function redisPathFault(url: string): string | null {
  const [, hosts = '', path = '', search] = /^[^:]*:\/\/(?:[^@/]*@)?([^/?]*)([^?]*)(.*)$/.exec(url) ?? [];
  const query = new URLSearchParams(search);
  if (![...query.keys()].every((name) => REDIS_PARAMETERS.has(name))) {
    return 'must have no parameter but cluster, db and family: TLS is asked for by rediss://, and a password stands before the host';
  }
  const databases = [path.replace(/^\//, '') || '0', ...query.getAll('db')];
  if (databases.some((database) => !/^\d{1,9}$/.test(database))) {
    return 'must have the number of a database after the host, as in redis://host:6379/1, or nothing';
  }
  if (!areSwitches(query, 'cluster')) {
    return 'may say ?cluster=true or ?cluster=false, nothing else of cluster';
  }
  if (!query.getAll('family').every((family) => ['0', '4', '6'].includes(family))) {
    return 'may say ?family=4 or ?family=6, for IPv4 or IPv6 alone, or ?family=0 for either, nothing else of family';
  }
  const isCluster = hosts.includes(',') || query.get('cluster') === 'true';
  if (isCluster && databases.some((database) => Number(database) !== 0)) {
    return 'must name no database but 0: a Redis Cluster has no other';
  }
  return null;
}
