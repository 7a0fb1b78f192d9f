/**
 * Somebody who means no harm, in a thread of his own: how long he waits must not be the attacker's own slowness.
 * Asks one thing every tenth of a second, and tells on request what he has seen since he was last asked.
 */
import { parentPort, workerData } from 'node:worker_threads';
import { io } from 'socket.io-client';

const PERIOD_MS = 100;

const socket = io(workerData.url, {
  transports: ['websocket'],
  auth: { token: workerData.token },
  reconnection: false,
});
let answered = 0;
let refused = 0;
let slowestMs = 0;
let disconnected = null;
let onAnswered = () => {};

function ask() {
  const askedMs = performance.now();
  socket.emit('keyStatus', {}, (reply) => {
    if (reply.ok) answered += 1;
    else refused += 1;
    slowestMs = Math.max(slowestMs, performance.now() - askedMs);
    onAnswered();
    setTimeout(ask, PERIOD_MS);
  });
}

socket.on('connect', ask);
socket.on('connect_error', (error) => {
  disconnected = error.message;
});
socket.on('disconnect', (reason) => {
  disconnected = reason;
});

parentPort.on('message', () => {
  // What is asked now is answered by a gateway that is through with what came before.
  onAnswered = () => {
    onAnswered = () => {};
    parentPort.postMessage({ answered, refused, slowestMs, disconnected });
    answered = 0;
    refused = 0;
    slowestMs = 0;
  };
  if (disconnected !== null) onAnswered();
});
