/** The way to an open gate. */
import { type RawSocket, SILENT } from './raw-socket.ts';

/** @returns what the server says when it has found the device's keys in step; undefined where it says nothing */
export async function validationOf(socket: RawSocket, validateInput: string): Promise<string | undefined> {
  const [verdict] = JSON.parse(await ask(socket, 'validateKeys', validateInput));
  return verdict.data?.validation;
}

export async function openGate(socket: RawSocket, validateInput: string): Promise<void> {
  const validation = await validationOf(socket, validateInput);
  const reply = await ask(socket, 'clientReady', JSON.stringify({ validation }));
  if (!reply.startsWith('[{"ok":true')) throw new Error(`a gate did not open: ${reply.slice(0, 200)}`);
}

/** @returns the reply, as it came */
export function ask(socket: RawSocket, event: string, input: string): Promise<string> {
  return new Promise((resolve, reject) => {
    socket.listener = {
      ...SILENT,
      onReply: (_, text) => resolve(text),
      onClose: (reason) => reject(new Error(`${event}: the connection was ${reason}`)),
    };
    socket.request(event, input);
  });
}
