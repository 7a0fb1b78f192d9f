/**
 * The inspectors of many nodes as one. A node with a viewer asks the others, every so often, to send what its viewers
 * want; one that is not asked again says nothing more. With no viewer anywhere nobody says anything.
 */
import { randomUUID } from 'node:crypto';
import { type Clock, every, type Timer } from '../lib/clock.ts';
import type { Log } from '../lib/log.ts';
import type { Relay } from '../ports/relay.ts';
import type { StreamEvent } from '../protocol/inspector/events.ts';
import type { SocketFacts } from '../protocol/inspector/facts.ts';
import type { StreamFilter } from '../protocol/inspector/filter.ts';
import type { NodeState } from '../protocol/inspector/stream.ts';
import type { LiveSockets, SocketQuery } from './live-sockets.ts';
import { createOutbox, type Outbox } from './outbox.ts';
import type { NodeCounts, NodeSample } from './overview.ts';
import type { Tap } from './tap.ts';

/** A viewer of this node, as the other nodes need to know it. */
export interface Viewer {
  filter: StreamFilter;
  outbox: Pick<Outbox, 'offer' | 'hasRoom' | 'drop'>;
}

/** What nodes ask each other. */
export type Question =
  | { about: 'sockets'; query: SocketQuery }
  | { about: 'life'; messageId: string }
  | { about: 'disconnect'; socket: number };

interface Answers {
  sockets: { sockets: SocketFacts[]; total: number };
  life: StreamEvent[];
  disconnect: boolean;
}

export interface Nodes {
  readonly node: string;
  /**
   * Shows the viewer what any node sees, until it is taken away.
   *
   * @returns `ready` resolves when the other nodes show it what happens on them, or don't answer in time
   */
  view(viewer: Viewer): { ready: Promise<void>; leave(): void };
  /** Tells `listener` each second's numbers of all nodes, until it is taken away. */
  count(listener: (samples: NodeSample[]) => void): () => void;
  /** Asks every node, this one too. @returns one answer of each node that gave one in time, and who did not */
  askAll<About extends Question['about']>(
    question: Extract<Question, { about: About }>,
  ): Promise<{ answers: Answers[About][]; nodes: NodeState[] }>;
  /** Asks one node. @returns null where it gave no answer in time */
  askOne<About extends Question['about']>(
    node: string,
    question: Extract<Question, { about: About }>,
  ): Promise<Answers[About] | null>;
  /** Those that were heard of lately. */
  states(): NodeState[];
  stop(): Promise<void>;
}

type Message =
  /** Everything that the sender's viewers want: it takes the place of what was asked before. */
  | { say: 'watch'; id: string; viewers: { id: string; filter: StreamFilter }[]; counts: boolean }
  | { say: 'events'; viewer: string; events: StreamEvent[]; dropped: number }
  | { say: 'sample'; sample: NodeSample }
  | { say: 'ask'; id: string; question: Question }
  | { say: 'answer'; id: string; answer: unknown };

/** A node that serves another's viewers stops after so long without being asked again. */
const WATCH_LEASE_MS = 6_000;
const WATCH_PERIOD_MS = 2_000;
const SAMPLE_PERIOD_MS = 1_000;
const ANSWER_WAIT_MAX_MS = 1_000;
/** A node that said nothing for so long is shown as not answering, and later forgotten. */
const SILENT_AFTER_MS = 6_000;
const FORGOTTEN_AFTER_MS = 60_000;
/** Viewers and nodes that one node serves; what stands on the channel must not fill the memory. */
const REMOTE_VIEWERS_MAX = 64;
const NODES_MAX = 256;

/** What this node does for the viewers of another. */
interface Served {
  dueMs: number;
  viewers: Map<string, { text: string; stop(): void }>;
  counts: boolean;
}

export async function createNodes(parts: {
  relay: Relay;
  tap: Tap;
  sockets: LiveSockets;
  startCounts(): NodeCounts;
  clock: Clock;
  log: Log;
}): Promise<Nodes> {
  const { relay, tap, sockets, startCounts, clock, log } = parts;
  const node = relay.nodeId;
  const viewers = new Map<string, Viewer>();
  const counters = new Set<(samples: NodeSample[]) => void>();
  const served = new Map<string, Served>();
  const heardAtMs = new Map<string, number>();
  const samples = new Map<string, NodeSample>();
  const questions = new Map<string, (from: string, answer: unknown) => void>();
  let counts: NodeCounts | null = null;
  let timers: Timer[] = [];

  // ── What others are asked for

  function sayTo(to: string, message: Message): void {
    relay.send(to, JSON.stringify(message));
  }

  /** Resolves when the others do it, or don't answer in time. */
  async function sayWhatIsWanted(): Promise<void> {
    const id = randomUUID();
    await ask({
      say: 'watch',
      id,
      viewers: [...viewers].map(([viewer, { filter }]) => ({ id: viewer, filter })),
      counts: counters.size > 0,
    });
  }

  /** Starts what is needed now, and ends what nobody needs any more. */
  function adjust(): void {
    const isBusy = viewers.size > 0 || counters.size > 0 || served.size > 0;
    if (isBusy && timers.length === 0) {
      timers = [every(clock, WATCH_PERIOD_MS, renew), every(clock, SAMPLE_PERIOD_MS, sample)];
    } else if (!isBusy) {
      for (const timer of timers) timer.cancel();
      timers = [];
      heardAtMs.clear();
      samples.clear();
    }
    const mustCount = counters.size > 0 || [...served.values()].some((one) => one.counts);
    if (mustCount) counts ??= startCounts();
    else {
      counts?.stop();
      counts = null;
    }
  }

  async function renew(): Promise<void> {
    if (viewers.size > 0 || counters.size > 0) void sayWhatIsWanted();
    const nowMs = clock.nowMs();
    for (const [from, one] of served) if (one.dueMs <= nowMs) stopServing(from);
    for (const [other, atMs] of heardAtMs) {
      if (nowMs - atMs > FORGOTTEN_AFTER_MS) heardAtMs.delete(other);
    }
    adjust();
  }

  async function sample(): Promise<void> {
    const taken = counts?.take();
    if (taken === undefined) return;
    for (const [to, one] of served) if (one.counts) sayTo(to, { say: 'sample', sample: taken });
    if (counters.size === 0) return;
    const nowMs = clock.nowMs();
    const others = [...samples.values()].filter(
      ({ node: other }) => nowMs - (heardAtMs.get(other) ?? 0) < SILENT_AFTER_MS,
    );
    // A sample counts once: a node that is late is missing for a second, not shown twice.
    samples.clear();
    for (const listener of counters) listener([taken, ...others]);
  }

  // ── What is done for others

  function serve(from: string, wanted: Extract<Message, { say: 'watch' }>): void {
    if (wanted.viewers.length === 0 && !wanted.counts) {
      stopServing(from);
      return;
    }
    let one = served.get(from);
    if (one === undefined) {
      if (served.size >= NODES_MAX) return;
      one = { dueMs: 0, viewers: new Map(), counts: false };
      served.set(from, one);
    }
    one.dueMs = clock.nowMs() + WATCH_LEASE_MS;
    one.counts = wanted.counts;
    const asked = new Map(
      wanted.viewers.slice(0, REMOTE_VIEWERS_MAX).map(({ id, filter }) => [id, filter] as const),
    );
    for (const [id, viewer] of one.viewers) {
      if (JSON.stringify(asked.get(id)) === viewer.text) continue;
      viewer.stop();
      one.viewers.delete(id);
    }
    for (const [id, filter] of asked) {
      if (one.viewers.has(id)) continue;
      const outbox = createOutbox({
        clock,
        send(events, dropped) {
          sayTo(from, { say: 'events', viewer: id, events, dropped });
          return true;
        },
      });
      const unwatch = tap.watch(filter, outbox);
      const stop = (): void => {
        unwatch();
        outbox.close();
      };
      one.viewers.set(id, { text: JSON.stringify(filter), stop });
    }
    adjust();
  }

  function stopServing(from: string): void {
    for (const viewer of served.get(from)?.viewers.values() ?? []) viewer.stop();
    served.delete(from);
    adjust();
  }

  function answerOf(question: Question): unknown {
    switch (question.about) {
      case 'sockets':
        return sockets.list(question.query);
      case 'life':
        return tap.lifeOf(question.messageId);
      case 'disconnect':
        return sockets.close(question.socket, 'an operator disconnected it');
      default:
        // A newer node asks what this one does not know yet.
        return null;
    }
  }

  function hear(from: string, text: string): void {
    let message: Message;
    try {
      message = JSON.parse(text) as Message;
    } catch {
      return;
    }
    if (heardAtMs.has(from) || heardAtMs.size < NODES_MAX) heardAtMs.set(from, clock.nowMs());
    switch (message.say) {
      case 'watch':
        serve(from, message);
        sayTo(from, { say: 'answer', id: message.id, answer: null });
        break;
      case 'events': {
        const outbox = viewers.get(message.viewer)?.outbox;
        for (const event of message.events) outbox?.offer(event);
        outbox?.drop(message.dropped);
        break;
      }
      case 'sample':
        if (counters.size > 0 && heardAtMs.has(from)) samples.set(from, message.sample);
        break;
      case 'ask':
        sayTo(from, { say: 'answer', id: message.id, answer: answerOf(message.question) });
        break;
      case 'answer':
        questions.get(message.id)?.(from, message.answer);
        break;
    }
  }

  /** Gathers answers until `expected` have come, or no more will. */
  async function gather(id: string, expected: Promise<number>): Promise<{ from: string; answer: unknown }[]> {
    const got: { from: string; answer: unknown }[] = [];
    await new Promise<void>((resolve) => {
      let wanted = Number.POSITIVE_INFINITY;
      const timer = clock.after(ANSWER_WAIT_MAX_MS, resolve);
      const check = (): void => {
        if (got.length < wanted) return;
        timer.cancel();
        resolve();
      };
      questions.set(id, (from, answer) => {
        got.push({ from, answer });
        check();
      });
      void expected.then((count) => {
        wanted = count;
        check();
      });
    });
    questions.delete(id);
    return got;
  }

  /** Asks every other node. */
  function ask(message: Extract<Message, { id: string }>): ReturnType<typeof gather> {
    return gather(message.id, relay.broadcast(JSON.stringify(message)));
  }

  function states(): NodeState[] {
    const nowMs = clock.nowMs();
    const others = [...heardAtMs]
      .filter(([, atMs]) => nowMs - atMs <= FORGOTTEN_AFTER_MS)
      .map(([other, atMs]) => ({ node: other, answering: nowMs - atMs < SILENT_AFTER_MS }));
    return [{ node, answering: true }, ...others.sort((a, b) => (a.node < b.node ? -1 : 1))];
  }

  await relay.start((from, text) => {
    try {
      hear(from, text);
    } catch (error) {
      // Whatever stands on the channel must not harm the gateway.
      log.warn({ error: error as Error }, 'another node’s inspector said what can not be understood');
    }
  });

  return {
    node,
    states,

    view(viewer) {
      const id = randomUUID();
      viewers.set(id, viewer);
      const unwatch = tap.watch(viewer.filter, viewer.outbox);
      const ready = sayWhatIsWanted();
      adjust();
      return {
        ready,
        leave() {
          unwatch();
          viewers.delete(id);
          void sayWhatIsWanted();
          adjust();
        },
      };
    },

    count(listener) {
      counters.add(listener);
      void sayWhatIsWanted();
      adjust();
      return () => {
        counters.delete(listener);
        void sayWhatIsWanted();
        adjust();
      };
    },

    async askAll(question) {
      const got = await ask({ say: 'ask', id: randomUUID(), question });
      const own = answerOf(question);
      const answered = new Set(got.map(({ from }) => from));
      const silent = states().filter(({ node: other }) => other !== node && !answered.has(other));
      return {
        answers: [own, ...got.map(({ answer }) => answer)].filter((answer) => answer !== null) as never[],
        nodes: [
          { node, answering: true },
          ...[...answered].sort().map((other) => ({ node: other, answering: true })),
          ...silent.map(({ node: other }) => ({ node: other, answering: false })),
        ],
      };
    },

    async askOne(to, question) {
      if (to === node) return answerOf(question) as never;
      const id = randomUUID();
      sayTo(to, { say: 'ask', id, question });
      const [first] = await gather(id, Promise.resolve(1));
      return (first?.answer ?? null) as never;
    },

    async stop() {
      for (const timer of timers) timer.cancel();
      for (const from of [...served.keys()]) stopServing(from);
      counts?.stop();
      await relay.stop();
    },
  };
}
