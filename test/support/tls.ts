/** Engines that speak TLS with a certificate that only those know who are told of it. */
import { execFile } from 'node:child_process';
import { chown, mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { engineUserFor, letPass } from '../../src/backends/postgres/engine-user.ts';
import { MissingEngineError } from './debian-binary.ts';

export interface Certificate {
  /** PEM; what `NODE_EXTRA_CA_CERTS` names. */
  certFile: string;
  keyFile: string;
  remove(): Promise<void>;
}

/** A certificate that vouches for itself, with a key that PostgreSQL's user may read. */
export async function selfMadeCertificate(subject = 'DNS:localhost'): Promise<Certificate> {
  const dir = await mkdtemp(join(tmpdir(), 'keygate-tls-'));
  const [certFile, keyFile] = [join(dir, 'cert.pem'), join(dir, 'key.pem')];
  const remove = () => rm(dir, { recursive: true, force: true });
  try {
    await promisify(execFile)('openssl', [
      ...['req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes'],
      ...['-days', '2', '-subj', '/CN=Keygate', '-addext', `subjectAltName=${subject}`],
      ...['-keyout', keyFile, '-out', certFile],
    ]);
  } catch (error) {
    await remove();
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    throw new MissingEngineError('The tests of TLS need openssl: install it.');
  }
  const user = await engineUserFor(join(dir, 'none'));
  if (user !== null) {
    await letPass(user, dir);
    await chown(keyFile, user.uid, user.gid);
    await chown(certFile, user.uid, user.gid);
  }
  return { certFile, keyFile, remove };
}
