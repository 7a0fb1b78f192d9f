/** `keygate/sdk`: for browsers and Node. */
export type { ErrorCode, ErrorDetails } from '../protocol/errors.ts';
export type { PushName, PushPayload, RequestData, RequestInput, RequestName } from '../protocol/events.ts';
export type { KeyVerdict } from './check-keys.ts';
export {
  type ClientSnapshot,
  type ClientState,
  type ConnectOptions,
  connect,
  type KeygateClient,
} from './client.ts';
export type { TokenReason } from './connection.ts';
export {
  type DeviceKeys,
  DuplicateMessageError,
  type PreKeyPool,
  type SignedPreKeySlot,
  UndecryptableError,
  type WireIdentity,
  type WireOneTimePreKey,
  type WireSignedPreKey,
} from './device-keys.ts';
export { KeygateError, KitError, type KitErrorCode } from './errors.ts';
export type { BounceEnvelope, MessageEnvelope } from './inbox.ts';
export type { Metrics } from './metrics.ts';
export { type KitMemory, type KitStorage, memoryStorage } from './storage.ts';
export { type KitClock, systemKitClock } from './time.ts';
