/** Socket.IO's own packets, bounded: it spreads their arguments over the stack, in a turn where nobody catches. */
import { Decoder, Encoder } from 'socket.io-parser';

/** A request has two arguments at most, an acknowledgement one; a few more are answered with BAD_REQUEST. */
const ARGUMENTS_MAX = 64;

class BoundedDecoder extends Decoder {
  constructor() {
    super();
    // The first listener of each packet: what it throws, Socket.IO takes for a broken packet and ends the connection.
    this.on('decoded', ({ data }) => {
      if (Array.isArray(data) && data.length > ARGUMENTS_MAX) throw new Error('too many arguments');
    });
  }
}

export const boundedParser = { Encoder, Decoder: BoundedDecoder };
