// The typed client in an app. `crypto` stands for your Signal library; private keys never reach the kit. It has
//   keys                          make and keep this device's keys (the type DeviceKeys)
//   hasSession(device)            whether there is a session to encrypt with; a device is { userId, deviceId }
//   openSession(userId, bundle)   begins one
//   dropSession(device)           ends it, for the device was set up anew; archived, it still reads what is under way
//   encrypt(device, text)         gives { deviceId, registrationId, type, content }: the registrationId is the session's,
//                                 by which the gateway tells that the device was set up anew; the content is base64
//   decrypt(envelope)             gives the text, kept on disk: the gateway forgets what was acknowledged
import { connect } from 'keygate/sdk';

const ROUNDS_MAX = 3;

/**
 * @param app what is yours: url, getToken() of your own login, me (the device that the token names), crypto, storage
 *   (KitStorage), show(sender, text), showUnsent(messageId, why), once for each device that a message can't reach
 */
export async function openChat({ url, getToken, me, crypto, storage, show, showUnsent }) {
  const lastTurns = new Map();
  /** Runs `work` when everything that was handed in before under the same key is done. */
  function inTurn(key, work) {
    const turn = (lastTurns.get(key) ?? Promise.resolve()).then(work);
    const over = turn
      .catch(() => {})
      .then(() => {
        if (lastTurns.get(key) === over) lastTurns.delete(key);
      });
    lastTurns.set(key, over);
    return turn;
  }
  // A Signal library reads a session, works, and writes it back. Two calls at once would begin from the same state and
  // encrypt under the same key, and the recipient drops the second message as a duplicate: so sessions take turns.
  // No request is waited for within such a turn, or messages would wait for it too.
  const withSessions = (work) => inTurn(crypto, work);

  const client = await connect({
    url,
    getToken,
    keys: crypto.keys,
    storage,
    // Acknowledged when it resolves: keep the message first.
    async onMessage(envelope) {
      show(envelope.sender, await withSessions(() => crypto.decrypt(envelope)));
    },
    async onBounce({ messageId, reason }) {
      showUnsent(messageId, reason);
    },
  });
  // Connects, compares keys with the gateway, keeps the pools filled, and opens the gate; again after each reconnection.
  if ((await client.start()) === 'needsSetup') await client.setUp();

  async function encryptFor(device, text) {
    if (!(await withSessions(() => crypto.hasSession(device)))) {
      const claimId = globalThis.crypto.randomUUID();
      const { devices } = await client.call('requestBundle', { claimId, ...device });
      for (const bundle of devices) await withSessions(() => crypto.openSession(device.userId, bundle));
    }
    return await withSessions(() => crypto.encrypt(device, text));
  }

  async function sendNow(userId, text, messageId) {
    const { devices } = await client.call('listDevices', { userId });
    const deviceIds = new Set(devices.map(({ deviceId }) => deviceId));
    if (userId === me.userId) deviceIds.delete(me.deviceId);
    for (let round = 1; deviceIds.size > 0; round++) {
      const envelopes = [];
      for (const deviceId of deviceIds) envelopes.push(await encryptFor({ userId, deviceId }, text));
      try {
        const { rejected } = await client.call('sendMessages', { messageId, userId, envelopes });
        // Devices whose queues are full; the others have it. Sent again under its id, it goes to those that lack it.
        for (const { code } of rejected) showUnsent(messageId, code);
        break;
      } catch (error) {
        if (error.code !== 'DEVICES_MISMATCHED' || round === ROUNDS_MAX) throw error;
        // Nothing was stored: the same message goes out again, to the devices that there are now.
        const { missingDevices, extraDevices, staleDevices } = error.details;
        for (const deviceId of missingDevices) deviceIds.add(deviceId);
        for (const deviceId of extraDevices) deviceIds.delete(deviceId);
        // Their sessions are of no use any more; a missing device may have begun a good one by a message of its own.
        for (const deviceId of [...extraDevices, ...staleDevices]) {
          await withSessions(() => crypto.dropSession({ userId, deviceId }));
        }
      }
    }
    return messageId;
  }

  return {
    client,
    /**
     * To every device of a user, one message after the other. Make the `messageId` yourself and keep it: where this
     * throws, the repeat must name the same, or the message may arrive twice. After a bounce it must name another.
     */
    send: (userId, text, messageId = globalThis.crypto.randomUUID()) =>
      inTurn(userId, () => sendNow(userId, text, messageId)),
  };
}
