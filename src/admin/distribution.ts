/**
 * A histogram that costs an addition: prom-client's own makes and hashes an object at each observation, which is more
 * than a whole report may cost. It is read by prom-client's registry like one of its own.
 */
import type { Metric, Registry } from 'prom-client';

export interface Distribution {
  observe(value: number): void;
}

export interface DistributionFamily {
  /** The one of these label values, the same each time. */
  of(labels: Readonly<Record<string, string>>): Distribution;
}

interface Series {
  labels: Readonly<Record<string, string>>;
  /** One for each bucket, and one for what is above all. Not cumulated. */
  counts: number[];
  sum: number;
}

/** @param options.buckets upper bounds, rising */
export function createDistribution(
  registry: Registry,
  options: { name: string; help: string; buckets: readonly number[] },
): DistributionFamily {
  const { name, help, buckets } = options;
  const family = new Map<string, Series & Distribution>();

  function series(labels: Readonly<Record<string, string>>): Series & Distribution {
    const counts = new Array<number>(buckets.length + 1).fill(0);
    const one = {
      labels,
      counts,
      sum: 0,
      observe(value: number) {
        let at = 0;
        while (at < buckets.length && value > buckets[at]!) at++;
        counts[at]! += 1;
        one.sum += value;
      },
    };
    return one;
  }

  const metric = {
    name,
    get: () => ({
      name,
      help,
      type: 'histogram',
      aggregator: 'sum',
      values: [...family.values()].flatMap(valuesOf),
    }),
    reset: () => family.clear(),
  };
  registry.registerMetric(metric as unknown as Metric);

  function valuesOf({ labels, counts, sum }: Series) {
    let count = 0;
    const cumulated = [...buckets, '+Inf'].map((le, at) => {
      count += counts[at]!;
      return { metricName: `${name}_bucket`, labels: { ...labels, le }, value: count };
    });
    return [
      ...cumulated,
      { metricName: `${name}_sum`, labels, value: sum },
      { metricName: `${name}_count`, labels, value: count },
    ];
  }

  return {
    of(labels) {
      const key = JSON.stringify(labels);
      let one = family.get(key);
      if (one === undefined) {
        one = series(labels);
        family.set(key, one);
      }
      return one;
    },
  };
}
