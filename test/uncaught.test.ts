import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';

function endOf(statements: string) {
  const script = `import { endOnUncaught, surviveFaults } from './src/uncaught.ts';
    endOnUncaught((error) => console.log('told', error.message));
    ${statements}`;
  const { status, stdout } = spawnSync(
    process.execPath,
    ['--import', 'tsx', '--input-type=module', '-e', script],
    {
      encoding: 'utf8',
    },
  );
  return { status, stdout };
}

describe('an exception that nobody caught', () => {
  it('is told and ends the process with 1', () => {
    expect(
      endOf(`setImmediate(() => { throw new Error('broken'); }); setTimeout(() => {}, 60_000);`),
    ).toEqual({
      status: 1,
      stdout: 'told broken\n',
    });
  });

  it('may be a rejection, or no error at all', () => {
    expect(endOf(`Promise.reject(new Error('broken')); setTimeout(() => {}, 60_000);`).status).toBe(1);
    expect(endOf(`setImmediate(() => { throw 'broken'; });`).stdout).toContain('broken');
  });

  it('ends nothing where a judge knows it, and ends the process once the judge is gone', () => {
    const { status, stdout } = endOf(`
      const takeAway = surviveFaults((error) => error.message === 'known');
      setImmediate(() => { throw new Error('known'); });
      setTimeout(() => {
        console.log('still here');
        takeAway();
        setImmediate(() => { throw new Error('known'); });
      }, 50);
    `);
    expect(stdout).toBe('still here\ntold known\n');
    expect(status).toBe(1);
  });
});
