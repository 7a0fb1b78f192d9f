/** Imported before the protocol: its schemas are made without code at run time, which the page's policy forbids. */
import { z } from 'zod';

z.config({ jitless: true });
