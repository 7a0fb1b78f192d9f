/** Writes down what was asked and what was answered, in the one order in which it is seen here. */
import type { Entry } from './linearize.ts';

export type Noted<Request, Answer> = Entry<Request, Answer> & {
  /** Who asked, and by which door. */
  by: string;
};

export interface History<Request, Answer> {
  entries: Noted<Request, Answer>[];
  /** Notes the request before `ask` is called, and the answer when it is there. */
  note(by: string, request: Request, ask: () => Promise<Answer | null>): Promise<Answer | null>;
}

export function createHistory<Request, Answer>(): History<Request, Answer> {
  const entries: Noted<Request, Answer>[] = [];
  let moment = 0;
  return {
    entries,
    async note(by, request, ask) {
      const entry: Noted<Request, Answer> = {
        ...{ by, request, answer: null },
        ...{ askedAt: moment++, answeredAt: Number.POSITIVE_INFINITY },
      };
      entries.push(entry);
      const answer = await ask();
      if (answer !== null) Object.assign(entry, { answer, answeredAt: moment++ });
      return answer;
    },
  };
}

/** `[3–7] alice by socket keyStatus {} → …` */
export function lineOf<Request extends { name: string }, Answer>(noted: Noted<Request, Answer>): string {
  const { by, request, answer, askedAt, answeredAt } = noted;
  const { name, ...input } = request;
  return `[${askedAt}–${answeredAt}] ${by} ${name} ${JSON.stringify(input)} → ${JSON.stringify(answer)}`;
}
