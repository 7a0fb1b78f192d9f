/** The filter of the live stream; what it says stands in the address, and the server applies it. */
import type { Ref } from 'preact';
import { useEffect, useRef, useState } from 'preact/hooks';
import { ERRORS } from '../../../protocol/errors.ts';
import { type Direction, streamEventNames } from '../../../protocol/inspector/events.ts';
import type { StreamFilter } from '../../../protocol/inspector/filter.ts';
import { type GateName, gateName } from '../../../protocol/inspector/values.ts';

const DIRECTIONS: Readonly<Record<Direction, string>> = { in: '→ in', out: '← out', server: '· inside' };
const CODES: readonly string[] = ['ok', ...Object.keys(ERRORS)];
/** Typing pauses this long before the filter is changed. */
const TYPING_PAUSE_MS = 500;

export function FilterBar(props: {
  filter: StreamFilter;
  onChange: (filter: StreamFilter) => void;
  deviceField: Ref<HTMLInputElement>;
}) {
  const { filter, onChange } = props;
  const put = <Name extends keyof StreamFilter>(name: Name, value: StreamFilter[Name] | undefined): void => {
    const { [name]: _, ...others } = filter;
    const isEmpty = value === undefined || (Array.isArray(value) && value.length === 0);
    onChange(isEmpty ? others : { ...others, [name]: value });
  };
  const setCount = Object.keys(filter).length;

  return (
    <search class="filter" aria-label="Filter">
      <TextField
        label="Device or user"
        placeholder="alice.1, bob"
        field={props.deviceField}
        value={filter.device?.join(', ') ?? ''}
        onChange={(text) => put('device', wordsOf(text))}
        class="filter-device"
      />
      <Choices
        label="Event"
        options={streamEventNames}
        chosen={filter.event ?? []}
        onChange={(names) => put('event', names)}
      />
      <Choices
        label="Result"
        options={CODES}
        chosen={filter.code ?? []}
        onChange={(codes) => put('code', codes as NonNullable<StreamFilter['code']>)}
      />
      <Toggles
        label="Direction"
        options={DIRECTIONS}
        chosen={filter.direction ?? []}
        onChange={(directions) => put('direction', directions)}
      />
      <Toggles
        label="Gate"
        options={Object.fromEntries(gateName.options.map((gate) => [gate, gate])) as Record<GateName, string>}
        chosen={filter.gate ?? []}
        onChange={(gates) => put('gate', gates)}
      />
      <TextField
        label="Slower than, ms"
        placeholder="ms"
        inputMode="decimal"
        value={filter.slowerThanMs === undefined ? '' : String(filter.slowerThanMs)}
        onChange={(text) => put('slowerThanMs', text.trim() === '' ? undefined : Number(text))}
        class="filter-slower"
      />
      <TextField
        label="Message id"
        placeholder="message id"
        value={filter.messageId ?? ''}
        onChange={(text) => put('messageId', text.trim() === '' ? undefined : text.trim())}
        class="filter-message"
      />
      {setCount > 0 && (
        <button type="button" class="plain" onClick={() => onChange({})}>
          Clear filter
        </button>
      )}
    </search>
  );
}

function wordsOf(text: string): string[] {
  return text.split(/[\s,]+/).filter((word) => word !== '');
}

function TextField(props: {
  label: string;
  placeholder: string;
  value: string;
  onChange: (text: string) => void;
  class: string;
  inputMode?: 'decimal';
  field?: Ref<HTMLInputElement>;
}) {
  const [text, setText] = useState(props.value);
  const pause = useRef<ReturnType<typeof setTimeout> | undefined>(undefined);
  const said = useRef(props.value);
  // What stands in the address wins, unless it is what was written here.
  useEffect(() => {
    if (props.value !== said.current) setText(props.value);
    said.current = props.value;
  }, [props.value]);
  useEffect(() => () => clearTimeout(pause.current), []);

  const say = (next: string): void => {
    clearTimeout(pause.current);
    if (next === said.current) return;
    said.current = next;
    props.onChange(next);
  };
  return (
    <input
      ref={props.field ?? null}
      class={`${props.class}${props.value === '' ? '' : ' is-set'}`}
      type="text"
      aria-label={props.label}
      title={props.label}
      placeholder={props.placeholder}
      inputMode={props.inputMode}
      spellcheck={false}
      autocomplete="off"
      value={text}
      onInput={({ currentTarget }) => {
        const { value } = currentTarget;
        setText(value);
        clearTimeout(pause.current);
        pause.current = setTimeout(() => say(value), TYPING_PAUSE_MS);
      }}
      onBlur={({ currentTarget }) => say(currentTarget.value)}
      onKeyDown={(event) => {
        if (event.key === 'Enter') say(event.currentTarget.value);
        if (event.key === 'Escape') event.currentTarget.blur();
      }}
    />
  );
}

/** A list of which several can be chosen, folded away. */
function Choices(props: {
  label: string;
  options: readonly string[];
  chosen: readonly string[];
  onChange: (chosen: string[]) => void;
}) {
  const box = useRef<HTMLDetailsElement>(null);
  useEffect(() => {
    const close = (event: Event): void => {
      const element = box.current;
      if (!element?.open) return;
      const isInside = event.target instanceof Node && element.contains(event.target);
      const isEscape = event instanceof KeyboardEvent && event.key === 'Escape';
      if (isEscape || (event.type === 'pointerdown' && !isInside)) element.open = false;
      if (isEscape) {
        event.preventDefault();
        if (isInside) element.querySelector('summary')?.focus();
      }
    };
    addEventListener('pointerdown', close);
    addEventListener('keydown', close, { capture: true });
    return () => {
      removeEventListener('pointerdown', close);
      removeEventListener('keydown', close, { capture: true });
    };
  }, []);

  const { label, options, chosen } = props;
  const summary = chosen.length === 0 ? '' : chosen.length === 1 ? `: ${chosen[0]}` : `: ${chosen.length}`;
  return (
    <details class={`choices${chosen.length > 0 ? ' is-set' : ''}`} ref={box}>
      <summary>
        {label}
        {summary}
      </summary>
      <fieldset>
        <legend class="hidden">{label}</legend>
        {options.map((option) => (
          <label key={option}>
            <input
              type="checkbox"
              checked={chosen.includes(option)}
              onChange={({ currentTarget }) =>
                props.onChange(
                  currentTarget.checked ? [...chosen, option] : chosen.filter((one) => one !== option),
                )
              }
            />
            {option}
          </label>
        ))}
      </fieldset>
    </details>
  );
}

function Toggles<Name extends string>(props: {
  label: string;
  options: Readonly<Record<Name, string>>;
  chosen: readonly Name[];
  onChange: (chosen: Name[]) => void;
}) {
  const { chosen } = props;
  return (
    <fieldset class="toggles">
      <legend class="hidden">{props.label}</legend>
      {(Object.entries(props.options) as [Name, string][]).map(([name, title]) => (
        <button
          key={name}
          type="button"
          aria-pressed={chosen.includes(name)}
          title={`${props.label}: ${name}`}
          onClick={() =>
            props.onChange(chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name])
          }
        >
          {title}
        </button>
      ))}
    </fieldset>
  );
}
