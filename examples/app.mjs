// The typed client in an app. `crypto` stands for your Signal library: its `keys` make and keep this device's keys
// (the type DeviceKeys), it opens sessions, encrypts and decrypts. Private keys never reach the kit.
import { connect } from 'keygate/sdk';

/** @param app what is yours: url, getToken() of your own login, crypto, storage (KitStorage), show(), showUnsent() */
export async function openChat({ url, getToken, crypto, storage, show, showUnsent }) {
  const client = await connect({
    url,
    getToken,
    keys: crypto.keys,
    storage,
    // Acknowledged when it resolves: keep the message first.
    async onMessage(envelope) {
      show(envelope.sender, await crypto.decrypt(envelope));
    },
    async onBounce({ messageId, reason }) {
      showUnsent(messageId, reason);
    },
  });
  // Connects, compares keys with the gateway, keeps the pools filled, and opens the gate; again after each reconnection.
  if ((await client.start()) === 'needsSetup') await client.setUp();

  return {
    client,
    /** To every device of a user. The ids are made once: over retries nothing is claimed or delivered twice. */
    async send(userId, text) {
      const messageId = globalThis.crypto.randomUUID();
      const { devices } = await client.call('listDevices', { userId });
      const envelopes = [];
      for (const { deviceId } of devices) {
        if (!(await crypto.hasSession({ userId, deviceId }))) {
          const claimId = globalThis.crypto.randomUUID();
          const claimed = await client.call('requestBundle', { claimId, userId, deviceId });
          for (const bundle of claimed.devices) await crypto.openSession(userId, bundle);
        }
        envelopes.push(await crypto.encrypt({ userId, deviceId }, text));
      }
      await client.call('sendMessages', { messageId, userId, envelopes });
      return messageId;
    },
  };
}
