import { existsSync, readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { environment } from '../src/config/environment.ts';
import { operatorCommands } from '../src/operate.ts';
import { withTables } from './reference/readme-tables.ts';

const readme = readFileSync('README.md', 'utf8');
const { dependencies, optionalDependencies, scripts, version } = JSON.parse(
  readFileSync('package.json', 'utf8'),
);

/** The first two cells of each row of the table under `heading`; what a command prints is none of it. */
function tableUnder(heading: string): [string, string][] {
  const section = readme.split(`\n## ${heading}\n`)[1]?.split('\n## ')[0] ?? '';
  const text = section.replace(/^```[\s\S]*?^```$/gm, '');
  const rows = text.split('\n').filter((line) => line.startsWith('| `'));
  return rows.map((row) => {
    const cells = row.split('|').map((cell) => cell.trim());
    return [cells[1]!.replaceAll('`', ''), cells[2]!];
  });
}

describe('README', () => {
  it('holds its generated tables as they would be written now', () => {
    expect(readme, 'npm run reference').toBe(withTables(readme));
  });

  it('names every variable of the configuration in its table, and no other', () => {
    const names = tableUnder('Configuration').map(([name]) => name);
    expect([...names].sort()).toEqual(Object.keys(environment.shape).sort());
  });

  it('tells the default that each variable has', () => {
    const defaults = environment.parse({}) as Record<string, unknown>;
    for (const [name, cell] of tableUnder('Configuration')) {
      const value = defaults[name];
      if (typeof value === 'string' || typeof value === 'number') expect(cell, name).toBe(`\`${value}\``);
    }
  });

  it('names every command of the command line, and no other', () => {
    const main = readFileSync('src/main.ts', 'utf8');
    const own = [...main.matchAll(/^ {2}'?([a-z-]+)'?: \{\n {4}summary:/gm)].map(([, name]) => name!);
    expect(own).toContain('serve');
    const named = tableUnder('Commands').map(([cell]) => cell.split(' ')[0]);
    expect(named.sort()).toEqual([...own, ...Object.keys(operatorCommands)].sort());
  });

  it('justifies every runtime dependency, and no other', () => {
    const names = tableUnder('Dependencies').map(([name]) => name);
    expect([...names].sort()).toEqual(Object.keys({ ...dependencies, ...optionalDependencies }).sort());
  });

  it('holds the two commands, and npm scripts that are there', () => {
    expect(readme).toContain('npm ci && npm start');
    expect(readme).toContain('npm ci && npm test');
    for (const [, script] of readme.matchAll(/npm run (\w+)/g))
      expect(Object.keys(scripts)).toContain(script);
  });

  it('links to files that are there', () => {
    for (const [, path] of readme.matchAll(/\]\((?!https?:)([^)]+)\)/g))
      expect(existsSync(path!), path).toBe(true);
  });
});

describe('CHANGELOG', () => {
  it('has the version of the package', () => {
    expect(readFileSync('CHANGELOG.md', 'utf8')).toContain(`\n## ${version}\n`);
  });
});
