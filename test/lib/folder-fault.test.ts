import { chown, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { folderFault } from '../../src/lib/folder-fault.ts';

const OTHER_UID = 12_345;
const denied = Object.assign(new Error('permission denied'), { code: 'EACCES' });

let own: string;
let others: string;

beforeAll(async () => {
  own = await mkdtemp(join(tmpdir(), 'keygate-own-'));
  if (process.getuid!() === 0) {
    others = await mkdtemp(join(tmpdir(), 'keygate-others-'));
    await chown(others, OTHER_UID, OTHER_UID);
  } else {
    others = '/';
  }
});

afterAll(async () => {
  await rm(own, { recursive: true });
  if (others !== '/') await rm(others, { recursive: true });
});

it('says whose a folder is that is closed to this user', () => {
  const uid = process.getuid!() === 0 ? OTHER_UID : 0;
  expect(folderFault(denied, others)).toMatchObject({
    message: `it belongs to another user (uid ${uid}): start as that user, or give ${others} with all that is in it to this one (uid ${process.getuid!()})`,
  });
});

it('leaves any other fault as it is', () => {
  const full = Object.assign(new Error('no space left'), { code: 'ENOSPC' });
  expect(folderFault(full, others)).toBe(full);
  expect(folderFault(denied, own)).toBe(denied);
  expect(folderFault(denied, join(own, 'absent'))).toBe(denied);
});
