/** How the page writes numbers and names. */

const whole = new Intl.NumberFormat('en-GB');

/** `12,480` */
export function count(value: number): string {
  return whole.format(value);
}

/** `1 socket`, `2 sockets` */
export function counted(value: number, one: string, many = `${one}s`): string {
  return `${count(value)} ${value === 1 ? one : many}`;
}

/** `812 B`, `4.1 KiB`, `2.0 MiB` */
export function bytes(value: number): string {
  if (value < 1024) return `${value} B`;
  if (value < 1024 * 1024) return `${(value / 1024).toFixed(1)} KiB`;
  return `${(value / 1024 / 1024).toFixed(1)} MiB`;
}
