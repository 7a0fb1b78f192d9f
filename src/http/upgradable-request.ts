/** A request that can become a WebSocket, and nothing else. */
import { IncomingMessage } from 'node:http';

/**
 * Node takes a request away from the door as soon as it offers an upgrade, whichever. But Java's client and curl's
 * `--http2` offer HTTP/2 with the requests that they make over plain HTTP, and what a server does not speak it has to
 * overlook (RFC 9110, section 7.8): such a request is like any other.
 */
export class UpgradableRequest extends IncomingMessage {
  // Node writes it while it constructs the request, before a field of ours could be there.
  declare protected _upgrade: boolean | null;

  get upgrade(): boolean | null {
    return this._upgrade && this.headers.upgrade?.toLowerCase() === 'websocket';
  }

  set upgrade(upgrade: boolean | null) {
    this._upgrade = upgrade;
  }
}
