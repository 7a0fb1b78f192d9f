/** Payloads as the server lets them be seen, as a tree. */
import type { RedactedValue } from '../../../protocol/redact.ts';
import { markedOf, markedText } from '../redacted-text.ts';

export function RedactedTree({ value }: { value: RedactedValue }) {
  const marked = markedOf(value);
  if (marked !== null) return <span class={`mark mark-${marked.kind}`}>{markedText(marked)}</span>;
  if (Array.isArray(value)) {
    if (value.length === 0) return <span class="quiet">[ ]</span>;
    const isFlat = value.every(
      (item) => typeof item !== 'object' || item === null || markedOf(item)?.kind === 'more',
    );
    if (isFlat) {
      return (
        <span class="flat">
          {value.map((item, index) => (
            <span key={index}>
              <RedactedTree value={item} />
              {index < value.length - 1 ? ', ' : ''}
            </span>
          ))}
        </span>
      );
    }
    return <Branches entries={value.map((item, index) => [String(index), item])} />;
  }
  if (typeof value !== 'object' || value === null) {
    return <span class={`leaf leaf-${value === null ? 'null' : typeof value}`}>{String(value)}</span>;
  }
  const entries = Object.entries(value);
  if (entries.length === 0) return <span class="quiet">{'{ }'}</span>;
  return <Branches entries={entries as [string, RedactedValue][]} />;
}

function Branches({ entries }: { entries: readonly [string, RedactedValue][] }) {
  return (
    <dl class="tree">
      {entries.map(([name, item]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>
            <RedactedTree value={item} />
          </dd>
        </div>
      ))}
    </dl>
  );
}
