/** The bare socket to a gateway, without any of the kit's care. */
import { io, type Socket } from 'socket.io-client';
import type { ClientToServerEvents, ServerToClientEvents } from '../protocol/socket-types.ts';

export type BareSocket = Socket<ServerToClientEvents, ClientToServerEvents>;

/** A connection of its own, not opened yet: give it `auth: { token }`, then `connect()`. */
export function createSocket(url: string): BareSocket {
  return io(url, {
    transports: ['websocket'],
    autoConnect: false,
    // Whoever holds it comes back by himself: Socket.IO would give up on a refusal, and knows nothing of draining.
    reconnection: false,
    forceNew: true,
  });
}
