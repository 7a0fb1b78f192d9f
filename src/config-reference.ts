/** What can be configured, told from the checks themselves: README's table and `keygate config-reference`. */
import type { VariableReference } from './admin/reference-page.ts';
import { environment } from './config/environment.ts';

/** Every variable, in the order in which it is best read. */
export function configReference(): VariableReference[] {
  const defaults: Readonly<Record<string, unknown>> = environment.parse({});
  return Object.entries(environment.shape).map(([name, schema]) => {
    const { meaning = '', unset = 'not set' } = schema.meta() ?? {};
    const value = defaults[name];
    const isPlain = typeof value === 'string' || typeof value === 'number';
    return { name, byDefault: isPlain ? `\`${value}\`` : unset, meaning };
  });
}
