/**
 * Why does this device not get its messages? From facts to plain language: the reason first, then what else is worth
 * knowing. Pure, so that every answer can be tried.
 */
import type { BounceReason } from '../protocol/envelope.ts';
import type { Diagnosis } from '../protocol/inspector/diagnosis.ts';
import type { SocketFacts } from '../protocol/inspector/facts.ts';
import type { NodeState } from '../protocol/inspector/stream.ts';
import { isoTime } from './live-sockets.ts';

export interface DeviceFacts {
  device: string;
  nowMs: number;
  /** The node that is asked. */
  node: string;
  nodes: readonly NodeState[];
  state: 'neverUploaded' | 'reset' | 'uploaded';
  keyVersion: number;
  /** On all nodes that answered. */
  sockets: readonly SocketFacts[];
  /** Envelopes in the queue. */
  pendingCount: number;
  /** The first of the queue that was put off; null where none is among the first. */
  putOff: PutOff | null;
  /** The message that is asked about; null where the question is about the device. */
  message: MessageFacts | null;
}

export interface PutOff {
  messageId: string;
  dueAtMs: number;
  undecryptableCount: number;
  temporaryCount: number;
}

export interface MessageFacts {
  messageId: string;
  state: 'neverStored' | 'waiting' | 'putOff' | 'bounced' | 'delivered';
  reason: BounceReason | null;
  /** Set where it was put off. */
  putOff: PutOff | null;
}

/** Written and not taken by the network beyond this, a client counts as slow; far beyond it, it is cut off. */
export const SLOW_BYTES = 256 * 1024;

/** At least one; the first is the reason. */
export function diagnose(facts: DeviceFacts): Diagnosis[] {
  const { device, message } = facts;
  if (message !== null && message.state !== 'waiting' && message.state !== 'putOff') {
    return [outcomeOf(device, message), ...otherNodes(facts)];
  }
  return [obstacle(facts), ...otherNodes(facts)];
}

function outcomeOf(device: string, { messageId, state, reason }: MessageFacts): Diagnosis {
  if (state === 'delivered') {
    return {
      kind: 'delivered',
      messageId,
      text: `${device} was given message ${messageId} and said that it processed it; the server has deleted it.`,
      nextStep: 'Look in the client: it acknowledged the message, so what became of it is in its own log.',
    };
  }
  if (state === 'bounced') {
    return {
      kind: 'bounced',
      messageId,
      reason,
      text: `Message ${messageId} was sent back to its sender: ${reason === null ? 'the sender has taken the bounce, and its reason is no longer kept' : BOUNCE_REASONS[reason]}.`,
      nextStep: 'Send the content again under a new message id, encrypted for a fresh bundle of the device.',
    };
  }
  return {
    kind: 'neverStored',
    messageId,
    text: `No message ${messageId} is stored for ${device}, nor remembered: it was refused, never arrived, went to other devices, or was finished more than a day ago.`,
    nextStep:
      'Look at the sender’s sendMessages in the live events: its answer says whether it was refused, and which devices it was accepted for.',
  };
}

const BOUNCE_REASONS: Readonly<Record<BounceReason, string>> = {
  RECIPIENT_IDENTITY_CHANGED: 'the device has replaced its identity key since, so nobody can decrypt it',
  RECIPIENT_KEYS_RESET: 'the device has reset its keys since, so nobody can decrypt it',
  DEVICE_REVOKED: 'the device was revoked',
  UNDECRYPTABLE: 'the device said three times that it can not decrypt it',
  EXPIRED: 'it waited longer than messages are kept',
};

/** What stands between the queue and the client, from the outermost to the innermost. */
function obstacle(facts: DeviceFacts): Diagnosis {
  const { device, keyVersion, message } = facts;
  if (facts.state === 'neverUploaded') {
    return {
      kind: 'neverUploaded',
      text: `${device} has never uploaded keys: nobody can encrypt for it, and nothing can be stored for it.`,
      nextStep: 'Let the client call uploadKeys, then validateKeys and clientReady.',
    };
  }
  if (facts.state === 'reset') {
    return {
      kind: 'keysReset',
      keyVersion,
      text: `${device} has reset its keys (key version ${keyVersion}) and uploaded none since.`,
      nextStep: 'Let the client call uploadKeys; what was sent before the reset went back to its senders.',
    };
  }
  const socket = newestOf(facts.sockets);
  if (socket === null) return noSocket(facts);
  return (
    obstacleOfGate(facts, socket) ??
    obstacleOfLine(facts, socket) ??
    obstacleOfQueue(facts, socket) ??
    (facts.pendingCount > 0 || message !== null
      ? {
          kind: 'onItsWay',
          pendingCount: facts.pendingCount,
          text: `The gate of ${device} is open and nothing holds it up; ${counted(facts.pendingCount)} to be handed out.`,
          nextStep:
            'Look again in a few seconds. A poke that was lost is made good by the sweep within 15 seconds.',
        }
      : {
          kind: 'nothingPending',
          text: `The gate of ${device} is open and its queue is empty: there is nothing that it does not get.`,
          nextStep: 'If a message is missed, ask with its message id, or look at the sender’s sendMessages.',
        })
  );
}

function noSocket({ device, pendingCount }: DeviceFacts): Diagnosis {
  return {
    kind: 'noSocket',
    pendingCount,
    text: `${device} is not connected; ${counted(pendingCount)} for it.`,
    nextStep:
      'Let the client connect. If it believes that it is connected, look for refused handshakes in the live events.',
  };
}

function obstacleOfGate({ device, nowMs, keyVersion }: DeviceFacts, socket: SocketFacts): Diagnosis | null {
  const { socket: number } = socket;
  if (socket.paused || Date.parse(socket.tokenExpiresAt) <= nowMs) {
    return {
      kind: 'tokenExpired',
      socket: number,
      expiredAt: socket.tokenExpiresAt,
      text: `The token of ${device} ran out at ${socket.tokenExpiresAt}: until it shows a new one nothing is handed out, and its socket will be closed.`,
      nextStep: 'Let the client answer tokenExpiring with refreshToken, or connect again with a new token.',
    };
  }
  if (socket.gate === 'open') return null;
  if (socket.gate === 'connected' || socket.keyVersion === null) {
    const voided = socket.gateHistory.at(-1)?.reason === 'serverRestored';
    return {
      kind: 'neverValidated',
      socket: number,
      text: voided
        ? `The server was restored from an older backup, so what ${device} had proven is void; it has not validated its keys since.`
        : `${device} is connected, but has not validated its keys on this connection: its gate is closed.`,
      nextStep:
        'Let the client call validateKeys; if its answer lists missingKeys, upload them, then call clientReady.',
    };
  }
  if (socket.keyVersion < keyVersion) {
    const reason = socket.gateHistory.findLast((step) => step.reason !== null)?.reason ?? null;
    return {
      kind: 'validatedOlderKeySet',
      socket: number,
      validatedVersion: socket.keyVersion,
      keyVersion,
      text: `${device} validated key version ${socket.keyVersion}, but the server has ${keyVersion}${reason === null ? '' : ` (${reason})`}: its gate is closed.`,
      nextStep: 'Let the client call validateKeys again, and clientReady with what that answers.',
    };
  }
  return {
    kind: 'notReady',
    socket: number,
    keyVersion: socket.keyVersion,
    text: `${device} has validated the current key set (version ${socket.keyVersion}), but has not said clientReady since.`,
    nextStep: 'Let the client call clientReady. If it did, look at the answer in the live events.',
  };
}

function obstacleOfLine({ device }: DeviceFacts, socket: SocketFacts): Diagnosis | null {
  if (socket.bufferedBytes > SLOW_BYTES) {
    return {
      kind: 'slow',
      socket: socket.socket,
      bufferedBytes: socket.bufferedBytes,
      text: `The network takes what is written to ${device} too slowly: ${Math.round(socket.bufferedBytes / 1024)} KiB wait to be read.`,
      nextStep:
        'Look at the client’s network, and whether it is suspended or busy. At 8 MiB it is cut off; its messages stay.',
    };
  }
  if (socket.windowFull) {
    return {
      kind: 'windowFull',
      socket: socket.socket,
      windowCount: socket.windowCount,
      oldestPushAt: socket.oldestPushAt,
      text: `${device} holds ${socket.windowCount} pushed envelopes without an acknowledgement: its window is full, and no more is pushed.`,
      nextStep:
        'Let the client acknowledge messages as it processes them. Without an acknowledgement for 30 seconds its socket is closed.',
    };
  }
  return null;
}

function obstacleOfQueue(facts: DeviceFacts, socket: SocketFacts): Diagnosis | null {
  const { device, message } = facts;
  const putOff = message === null ? facts.putOff : message.putOff;
  if (message === null || putOff === null) {
    if (socket.oldestPushAt !== null) {
      return {
        kind: 'notAcknowledged',
        socket: socket.socket,
        oldestPushAt: socket.oldestPushAt,
        text: `${socket.windowCount} ${socket.windowCount === 1 ? 'envelope was' : 'envelopes were'} pushed to ${device}, the oldest at ${socket.oldestPushAt}; the acknowledgement has not come.`,
        nextStep: 'Look in the client: it acknowledges messages only when it has processed them.',
      };
    }
  }
  if (putOff === null) return null;
  const { messageId, dueAtMs, undecryptableCount, temporaryCount } = putOff;
  return {
    kind: 'putOff',
    messageId,
    dueAt: isoTime(dueAtMs),
    undecryptableCount,
    temporaryCount,
    text: `${device} said that it failed with message ${messageId} (undecryptable ${undecryptableCount}, temporary ${temporaryCount} times); it is offered again at ${isoTime(dueAtMs)}.`,
    nextStep:
      undecryptableCount > 0
        ? 'Look at the client’s session with the sender: after three undecryptable answers the message bounces.'
        : 'Look in the client’s log for why it could not process the message.',
  };
}

/** Where else one has to look, or could not. */
function otherNodes({ device, node, nodes, sockets }: DeviceFacts): Diagnosis[] {
  const socket = newestOf(sockets);
  if (socket !== null && socket.node !== node) {
    return [
      {
        kind: 'otherNode',
        node: socket.node,
        answering: true,
        text: `The socket of ${device} is on node ${socket.node}.`,
        nextStep: 'Look for its connection in that node’s log.',
      },
    ];
  }
  if (socket !== null) return [];
  return nodes
    .filter(({ answering }) => !answering)
    .map((silent) => ({
      kind: 'otherNode' as const,
      node: silent.node,
      answering: false,
      text: `Node ${silent.node} did not answer: a socket of ${device} may be there.`,
      nextStep: 'Look whether that node runs and reaches Redis.',
    }));
}

/** A newer connection displaces the older ones; for a moment both may be there. */
function newestOf(sockets: readonly SocketFacts[]): SocketFacts | null {
  return sockets.reduce<SocketFacts | null>(
    (newest, socket) => (newest === null || socket.socket > newest.socket ? socket : newest),
    null,
  );
}

function counted(count: number): string {
  return count === 1 ? '1 envelope waits' : `${count} envelopes wait`;
}
