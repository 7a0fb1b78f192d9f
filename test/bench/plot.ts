/** The rates as bars, with a mark for every round: a small SVG without any library. */
import { median, type Results } from './figures.ts';

const WIDTH = 860;
const ROW_HEIGHT = 44;
const LABEL_WIDTH = 170;
const FIGURE_WIDTH = 110;
const HEAD_HEIGHT = 56;

export function toSvg(results: Results): string {
  const rows = results.entrants.map(({ name, operation, isGateway }) => ({
    name,
    operation,
    isGateway,
    rates: results.rounds.flatMap((round) => (round[name] === undefined ? [] : [round[name].perSecond])),
  }));
  const rateMax = Math.max(1, ...rows.flatMap((row) => row.rates));
  const x = (rate: number) => LABEL_WIDTH + (rate / rateMax) * (WIDTH - LABEL_WIDTH - FIGURE_WIDTH);
  const height = HEAD_HEIGHT + rows.length * ROW_HEIGHT + 12;
  const bars = rows.map((row, index) => {
    const y = HEAD_HEIGHT + index * ROW_HEIGHT;
    const middle = row.rates.length === 0 ? 0 : median(row.rates);
    const marks = row.rates
      .map(
        (rate) =>
          `<line x1="${x(rate).toFixed(1)}" x2="${x(rate).toFixed(1)}" y1="${y + 3}" y2="${y + 29}"/>`,
      )
      .join('');
    const fill = row.isGateway ? '#2f6f9f' : '#a9b7c0';
    return `
  <text x="${LABEL_WIDTH - 10}" y="${y + 21}" text-anchor="end">${row.name}</text>
  <rect x="${LABEL_WIDTH}" y="${y + 6}" width="${(x(middle) - LABEL_WIDTH).toFixed(1)}" height="20" fill="${fill}"/>
  <g stroke="#1b1b1b" stroke-opacity="0.55">${marks}</g>
  <text x="${(x(Math.max(middle, ...row.rates)) + 8).toFixed(1)}" y="${y + 21}">${Math.round(middle).toLocaleString('en')} ${row.operation}s/s</text>`;
  });
  const { setting } = results;
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH + 60}" height="${height}" font-family="sans-serif" font-size="13">
  <rect width="100%" height="100%" fill="white"/>
  <text x="14" y="22" font-size="15" font-weight="bold">Operations a second: median, and a mark for each round</text>
  <text x="14" y="42" fill="#555">${escaped(`commit ${setting.commit}, ${setting.date}, ${setting.machine}`)}</text>${bars.join('')}
</svg>
`;
}

function escaped(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;');
}
