/** The difference of two values as JSON has them, leaf by leaf. */

export type Leaf = string | number | boolean | null;
export type Difference =
  | { kind: 'same'; path: string; value: Leaf }
  | { kind: 'changed'; path: string; before: Leaf; after: Leaf }
  | { kind: 'removed'; path: string; before: Leaf }
  | { kind: 'added'; path: string; after: Leaf };

/** Every leaf of either value, in the order of `before` and then of `after`. */
export function differences(before: unknown, after: unknown): Difference[] {
  const olds = leavesOf(before);
  const news = leavesOf(after);
  return [...new Set([...olds.keys(), ...news.keys()])].map((path): Difference => {
    const [old, fresh] = [olds.get(path), news.get(path)];
    if (old === undefined) return { kind: 'added', path, after: fresh! };
    if (fresh === undefined) return { kind: 'removed', path, before: old };
    return old === fresh
      ? { kind: 'same', path, value: old }
      : { kind: 'changed', path, before: old, after: fresh };
  });
}

/** `envelopes[0].type` → 3; an empty list or object is a leaf of its own. */
export function leavesOf(value: unknown): Map<string, Leaf> {
  const leaves = new Map<string, Leaf>();
  const visit = (part: unknown, path: string): void => {
    if (Array.isArray(part)) {
      if (part.length === 0) leaves.set(path, '[]');
      for (const [index, item] of part.entries()) visit(item, `${path}[${index}]`);
    } else if (typeof part === 'object' && part !== null) {
      const entries = Object.entries(part);
      if (entries.length === 0) leaves.set(path, '{}');
      for (const [name, item] of entries) visit(item, path === '' ? name : `${path}.${name}`);
    } else if (part !== undefined) leaves.set(path, part as Leaf);
  };
  visit(value, '');
  return leaves;
}
