/** The virtualiser in Preact's terms: renders again when the rows in sight change. */
import {
  elementScroll,
  observeElementOffset,
  observeElementRect,
  Virtualizer,
  type VirtualizerOptions,
} from '@tanstack/virtual-core';
import { useLayoutEffect, useReducer, useState } from 'preact/hooks';

type Rows = Virtualizer<HTMLDivElement, HTMLDivElement>;

/** Rows of one height, of which only those in sight and a few beside them are in the page. */
export function useVirtualRows(options: {
  count: number;
  rowHeightPx: number;
  scroller: () => HTMLDivElement | null;
}): Rows {
  const [, renderAgain] = useReducer((times: number, _: null) => times + 1, 0);
  const all: VirtualizerOptions<HTMLDivElement, HTMLDivElement> = {
    count: options.count,
    estimateSize: () => options.rowHeightPx,
    getScrollElement: options.scroller,
    overscan: 12,
    scrollToFn: elementScroll,
    observeElementRect,
    observeElementOffset,
    onChange: () => renderAgain(null),
  };
  const [rows] = useState<Rows>(() => new Virtualizer(all));
  rows.setOptions(all);
  useLayoutEffect(() => rows._didMount(), [rows]);
  useLayoutEffect(() => rows._willUpdate());
  return rows;
}
