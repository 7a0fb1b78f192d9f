/** Socket.IO's own packets, bounded: it spreads their arguments over the stack, in a turn where nobody catches. */
import { createRequire } from 'node:module';
import type * as Parser from 'socket.io-parser';
import { nestsDeeper } from '../lib/json-depth.ts';
import { FRAME_BYTES_MAX, JSON_DEPTH_MAX } from '../protocol/limits.ts';

// The build that Socket.IO itself runs on: an `import` would bring the one with debugging in it.
const { Decoder, Encoder } = createRequire(import.meta.url)('socket.io-parser') as typeof Parser;

/** A request has two arguments at most, an acknowledgement one; a few more are answered with BAD_REQUEST. */
export const ARGUMENTS_MAX = 64;

/** Keys or ciphertext as bytes, where base64 is asked for, are answered with BAD_REQUEST: a full upload has some three hundred. */
const ATTACHMENTS_MAX = 512;

/** The event's arguments are the one thing of a frame that reaches the socket. */
const frameBytes = new WeakMap<unknown[], number>();

/** How large the frames were that brought an event; Socket.IO hands its arguments on as the very list they were. */
export function frameBytesOf(event: unknown[]): number {
  return frameBytes.get(event) ?? 0;
}

class BoundedDecoder extends Decoder {
  private bytes = 0;

  constructor() {
    super({ maxAttachments: ATTACHMENTS_MAX });
    // The first listener of each packet: what it throws, Socket.IO takes for a broken packet and ends the connection.
    this.on('decoded', ({ data }) => {
      if (!Array.isArray(data)) return;
      if (data.length > ARGUMENTS_MAX) throw new Error('too many arguments');
      frameBytes.set(data, this.bytes);
    });
  }

  override add(frame: string | Buffer): void {
    // A text begins a packet; binary frames belong to the text before them.
    this.bytes = (typeof frame === 'string' ? 0 : this.bytes) + frame.length;
    // Attachments pile up until the last of them has come.
    if (this.bytes > FRAME_BYTES_MAX) throw new Error('too many bytes of attachments');
    if (typeof frame === 'string' && nestsDeeper(frame, JSON_DEPTH_MAX)) throw new Error('nested too deep');
    super.add(frame);
  }
}

/** What the gateway sends is text alone, so nothing is searched for binary parts. */
class TextEncoder extends Encoder {
  override encode({ type, nsp, id, data }: Parser.Packet): string[] {
    const namespace = nsp === '/' ? '' : `${nsp},`;
    return [`${type}${namespace}${id ?? ''}${data === undefined ? '' : JSON.stringify(data)}`];
  }
}

export const boundedParser = { Encoder: TextEncoder, Decoder: BoundedDecoder };
