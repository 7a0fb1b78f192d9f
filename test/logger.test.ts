import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { closeSync, openSync } from 'node:fs';
import { describe, expect, it } from 'vitest';

/** What a process that runs `statements` with a log of `level` writes. */
function written(level: string, statements: string) {
  const script = `import { createLogger } from './src/logger.ts'; const log = createLogger('${level}'); ${statements}`;
  return spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', script], {
    encoding: 'utf8',
  });
}

describe('log', () => {
  it('writes JSON lines to stderr, from the level on', () => {
    const { stdout, stderr } = written(
      'info',
      `log.debug({}, 'unseen'); log.info({ device: 'alice.1' }, 'seen'); process.exit(0)`,
    );
    expect(stdout).toBe('');
    const lines = stderr.trim().split('\n');
    expect(lines).toHaveLength(1);
    expect(JSON.parse(lines[0]!)).toMatchObject({ level: 'info', device: 'alice.1', msg: 'seen' });
  });

  it('writes of an error where it came from and its causes, and nothing that drivers hang on it', () => {
    const { stderr } = written(
      'error',
      `const cause = Object.assign(new Error('gone'), { code: '57P01', parameters: ['hunter2'] });
       const error = new Error('Failed query: select 1\\nparams: hunter2,hunter2', { cause });
       log.error({ error: Object.assign(error, { query: 'hunter2', claims: { sub: 'hunter2' } }) }, 'failed')`,
    );
    expect(stderr).not.toContain('hunter2');
    expect(JSON.parse(stderr)).toMatchObject({
      error: {
        type: 'Error',
        message: 'Failed query: select 1',
        at: expect.arrayContaining([expect.any(String)]),
        cause: { message: 'gone', code: '57P01' },
      },
    });
  });

  describe('where nothing can be written', () => {
    const script = `import { createLogger } from './src/logger.ts';
      const log = createLogger('info');
      for (let i = 0; i < 5_000; i++) log.info({ i }, 'x'.repeat(500));
      console.log('went on');`;
    const args = ['--import', 'tsx', '--input-type=module', '-e', script];

    it.each(['a full disk', 'a pipe that nobody reads'])('as %s, the process goes on', async (where) => {
      const full = openSync('/dev/full', 'w');
      const stdio = ['ignore', 'pipe', where === 'a full disk' ? full : 'pipe'] as const;
      const child = spawn(process.execPath, args, { stdio: [...stdio] });
      try {
        const [output] = await once(child.stdout!, 'data');
        expect(String(output)).toBe('went on\n');
        expect(await once(child, 'exit')).toEqual([0, null]);
      } finally {
        child.kill('SIGKILL');
        closeSync(full);
      }
    });
  });

  it('can be silenced', () => {
    expect(written('silent', `log.error({}, 'unheard')`).stderr).toBe('');
  });
});
