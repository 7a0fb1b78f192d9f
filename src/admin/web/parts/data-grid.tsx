/** A table of any length: virtualised rows, one of them selected, moved over by keys. */

// biome-ignore-all lint/a11y/useSemanticElements: a table element lays out all of its rows; these are drawn in sight only
// biome-ignore-all lint/a11y/useFocusableInteractive: the grid holds the focus and names its active row
// biome-ignore-all lint/a11y/useKeyWithClickEvents: the keys are the grid's
import type { ComponentChildren } from 'preact';
import { useEffect, useLayoutEffect, useRef } from 'preact/hooks';
import { useVirtualRows } from './use-virtual-rows.ts';

export interface Column<Row> {
  /** Names the CSS class `col-<name>`, by which a narrow page leaves columns out. */
  name: string;
  title: string;
  cell: (row: Row) => ComponentChildren;
}

export interface DataGridProps<Row> {
  label: string;
  /** Names the CSS class `grid-<name>`, which gives the columns their widths. */
  name: string;
  columns: readonly Column<Row>[];
  count: number;
  rowAt: (index: number) => Row | undefined;
  keyOf: (row: Row) => string;
  /** Appended to the row's class, to mark errors say. */
  toneOf?: (row: Row) => string;
  /** The index of the selected row, or -1. */
  selectedIndex: number;
  /** A second row that the selected one is compared with, or -1. */
  comparedIndex?: number;
  /** Whether keys stop at the row; they do at each where this is absent. */
  canSelect?: (row: Row) => boolean;
  onSelect: (row: Row, how: { compare: boolean }) => void;
  /** Enter on the selected row. */
  onOpen?: (row: Row) => void;
  /** Keeps the newest row in sight. */
  follow?: { on: boolean; onChange: (on: boolean) => void };
  /** How many rows have gone at the top so far: what is read must not slide away. */
  forgottenCount?: number;
  empty: ComponentChildren;
}

const ROW_HEIGHT_PX = 26;
const PAGE_ROWS = 20;

export function DataGrid<Row>(props: DataGridProps<Row>) {
  const { columns, count, rowAt, keyOf, selectedIndex, follow, forgottenCount = 0 } = props;
  const grid = useRef<HTMLDivElement>(null);
  const scroller = useRef<HTMLDivElement>(null);
  const lastTop = useRef(0);
  const lastForgotten = useRef(forgottenCount);
  const rows = useVirtualRows({ count, rowHeightPx: ROW_HEIGHT_PX, scroller: () => scroller.current });

  useLayoutEffect(() => {
    const element = scroller.current;
    if (element === null) return;
    const gone = forgottenCount - lastForgotten.current;
    lastForgotten.current = forgottenCount;
    if (follow?.on) element.scrollTop = element.scrollHeight;
    else if (gone > 0) element.scrollTop -= gone * ROW_HEIGHT_PX;
    lastTop.current = element.scrollTop;
  });

  useEffect(() => {
    if (selectedIndex >= 0) rows.scrollToIndex(selectedIndex, { align: 'auto' });
  }, [selectedIndex < 0 ? null : keyOf(rowAt(selectedIndex)!)]);

  // It has the keys from the start, unless somebody writes somewhere.
  useEffect(() => {
    if (document.activeElement?.closest('input') == null) grid.current?.focus({ preventScroll: true });
  }, []);

  const onScroll = (): void => {
    const element = scroller.current;
    if (element === null || follow === undefined) return;
    const isAtEnd = element.scrollHeight - element.clientHeight - element.scrollTop < ROW_HEIGHT_PX;
    // Only the reader scrolls up; following always moves down.
    if (follow.on && !isAtEnd && element.scrollTop < lastTop.current - 1) follow.onChange(false);
    else if (!follow.on && isAtEnd && element.scrollTop > lastTop.current) follow.onChange(true);
    lastTop.current = element.scrollTop;
  };

  /** Selects the row there, or the next one on that can be selected; none at the end of the way. */
  const move = (target: number, step: 1 | -1): void => {
    const start = Math.max(0, Math.min(count - 1, target));
    for (let index = start; index >= 0 && index < count; index += step) {
      const row = rowAt(index)!;
      if (props.canSelect?.(row) === false) continue;
      props.onSelect(row, { compare: false });
      return;
    }
  };
  const onKeyDown = (event: KeyboardEvent): void => {
    if (event.ctrlKey || event.metaKey || event.altKey || count === 0) return;
    const start = selectedIndex < 0 && event.key !== 'End' ? (follow?.on ? count : -1) : selectedIndex;
    const steps: Record<string, number> = {
      ArrowDown: start + 1,
      j: start + 1,
      ArrowUp: start - 1,
      k: start - 1,
      PageDown: start + PAGE_ROWS,
      PageUp: start - PAGE_ROWS,
      Home: 0,
      End: count - 1,
    };
    const target = steps[event.key];
    if (target !== undefined) {
      event.preventDefault();
      if (target < count - 1) follow?.onChange(false);
      move(target, target < start || event.key === 'End' ? -1 : 1);
    } else if (event.key === 'Enter' && selectedIndex >= 0) props.onOpen?.(rowAt(selectedIndex)!);
  };

  const items = rows.getVirtualItems();
  const selected = rowAt(selectedIndex);
  return (
    <div
      ref={grid}
      class={`grid grid-${props.name}`}
      role="grid"
      aria-label={props.label}
      aria-rowcount={count + 1}
      aria-activedescendant={selected === undefined ? undefined : `${props.name}-${keyOf(selected)}`}
      tabIndex={0}
      onKeyDown={onKeyDown}
    >
      <div class="grid-head" role="row" aria-rowindex={1}>
        {columns.map(({ name, title }) => (
          <div key={name} role="columnheader" class={`cell col-${name}`}>
            {title}
          </div>
        ))}
      </div>
      <div class="grid-body" role="presentation" ref={scroller} onScroll={onScroll}>
        {count === 0 && <div class="empty">{props.empty}</div>}
        <div class="grid-space" role="presentation" style={{ height: `${rows.getTotalSize()}px` }}>
          {/* Rows are told apart by their place: the same few elements show whatever is in sight. */}
          <div
            class="grid-window"
            role="presentation"
            style={{ transform: `translateY(${items[0]?.start ?? 0}px)` }}
          >
            {items.map(({ index }, place) => {
              const row = rowAt(index);
              if (row === undefined) return null;
              return (
                <GridRow
                  key={place}
                  id={`${props.name}-${keyOf(row)}`}
                  index={index}
                  row={row}
                  columns={columns}
                  tone={props.toneOf?.(row) ?? ''}
                  isSelected={index === selectedIndex}
                  isCompared={index === props.comparedIndex}
                  onSelect={props.onSelect}
                  onOpen={props.onOpen}
                />
              );
            })}
          </div>
        </div>
      </div>
    </div>
  );
}

function GridRow<Row>(props: {
  id: string;
  index: number;
  row: Row;
  columns: readonly Column<Row>[];
  tone: string;
  isSelected: boolean;
  isCompared: boolean;
  onSelect: DataGridProps<Row>['onSelect'];
  onOpen: DataGridProps<Row>['onOpen'];
}) {
  const { row, columns, isSelected, isCompared } = props;
  const marks = `${isSelected ? ' is-selected' : ''}${isCompared ? ' is-compared' : ''}`;
  return (
    <div
      id={props.id}
      class={`row ${props.tone}${marks}`}
      role="row"
      aria-rowindex={props.index + 2}
      aria-selected={isSelected}
      onClick={(event) => props.onSelect(row, { compare: event.shiftKey })}
      onDblClick={() => props.onOpen?.(row)}
    >
      {columns.map(({ name, cell }) => (
        <div key={name} role="gridcell" class={`cell col-${name}`}>
          {cell(row)}
        </div>
      ))}
    </div>
  );
}
