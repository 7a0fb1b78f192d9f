/** What everything that the inspector shows is made of. Nothing of it can carry key material, ciphertext or a token. */
import { z } from 'zod';

export const count = z.int().min(0);
/** `alice.1`, as `addressKey` writes it. */
export const deviceKey = z.string();
/** The number of a connection, unique over all nodes and restarts; a newer connection has a higher one. */
export const socketNumber = z.int();

export const gateName = z.enum(['connected', 'validated', 'open']);
export type GateName = z.infer<typeof gateName>;
