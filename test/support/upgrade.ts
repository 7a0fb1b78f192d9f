/** What a gateway answers in plain HTTP to a request to become a WebSocket that it refuses. */
import { request } from 'node:http';

export interface RefusedUpgrade {
  status: number;
  headers: NodeJS.Dict<string | string[]>;
  // biome-ignore lint/suspicious/noExplicitAny: what came over the wire is what is looked at
  body: any;
}

/** @throws Error where the connection became a WebSocket */
export async function refusedUpgrade(
  url: string,
  headers: Record<string, string> = {},
): Promise<RefusedUpgrade> {
  return await new Promise((resolve, reject) => {
    const asking = request(`${url}/socket.io/?EIO=4&transport=websocket`, {
      headers: {
        connection: 'Upgrade',
        upgrade: 'websocket',
        'sec-websocket-version': '13',
        'sec-websocket-key': 'AAAAAAAAAAAAAAAAAAAAAA==',
        ...headers,
      },
    });
    asking.on('error', reject);
    asking.on('upgrade', (_, socket) => {
      socket.destroy();
      reject(new Error('it became a WebSocket'));
    });
    asking.on('response', (response) => {
      let text = '';
      response.setEncoding('utf8').on('data', (chunk) => {
        text += chunk;
      });
      response.on('end', () =>
        resolve({ status: response.statusCode!, headers: response.headers, body: JSON.parse(text) }),
      );
    });
    asking.end();
  });
}
