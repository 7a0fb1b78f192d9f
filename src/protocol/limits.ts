/** Every bound of the wire. A number that a client can meet stands here and nowhere else. */

export const USER_ID_LENGTH_MAX = 128;
export const DEVICE_ID_MAX = 127;
export const KEY_ID_MAX = 2 ** 32 - 1;
export const REGISTRATION_ID_MAX = 16383;
/** Versions count changes of one device; the bound keeps sums of them exact in a double. */
export const VERSION_MAX = 2 ** 48;
/** A client may have seen a version this far above the server's, before the server was rolled back. */
export const VERSION_LEAP_MAX = 2 ** 32;

/** One-time prekeys of one kind in one upload. */
export const UPLOAD_PRE_KEYS_MAX = 100;
/** Ids of one kind in one withdrawal. */
export const WITHDRAW_PRE_KEYS_MAX = 1000;
/** Ids of one kind, under one identity, that may ever be withdrawn although the server had never seen them. */
export const WITHDRAW_UNSEEN_MAX = 10_000;
/** Identities of a device under which ids are kept, where a client names one that was never uploaded here. */
export const WITHDRAW_IDENTITIES_MAX = 8;
/** Ids of one kind that a client may list for comparison. */
export const VALIDATE_PRE_KEYS_MAX = 2000;
/** Devices of one user, and so envelopes of one request and bundles of one answer. */
export const USER_DEVICES_MAX = DEVICE_ID_MAX;

export const ENVELOPE_TYPE_MAX = 255;
/** One ciphertext, decoded. */
export const CONTENT_BYTES_MAX = 96 * 1024;
/** All ciphertexts of one request, decoded. */
export const REQUEST_CONTENT_BYTES_MAX = 1024 * 1024;
/** One frame or HTTP body: a full request in base64 and its frame. */
export const FRAME_BYTES_MAX = 2 * 1024 * 1024;
/** Lists and objects within each other: a frame or HTTP body of more than 1 KiB has no deeper ones. */
export const JSON_DEPTH_MAX = 16;

/** One push of envelopes. */
export const PAGE_ENVELOPES_MAX = 100;
export const PAGE_BYTES_MAX = 512 * 1024;
/** Pushed and not yet acknowledged, per socket. */
export const WINDOW_ENVELOPES_MAX = 256;
export const WINDOW_BYTES_MAX = 2 * 1024 * 1024;
/** A push that is not acknowledged within this time closes the socket. */
export const ACKNOWLEDGEMENT_TIMEOUT_MS = 30_000;

export const REASON_LENGTH_MAX = 256;
export const TOKEN_LENGTH_MAX = 8 * 1024;
/** Faults listed in one BAD_REQUEST. */
export const ISSUES_MAX = 50;

/** How long a `validation` opens the gate. */
export const VALIDATION_LIFETIME_MS = 10 * 60_000;
/** How long a repeated `claimId` gets its first answer, at least. */
export const CLAIM_MEMORY_MS = 24 * 3_600_000;
/** How long a processed `messageId` is remembered, at least. */
export const MESSAGE_ID_MEMORY_MS = 24 * 3_600_000;
