/** Socket.IO's event maps, derived from the registry: `Socket<ServerToClientEvents, ClientToServerEvents>` is typed. */
import type {
  MessagesAcknowledgement,
  PushName,
  PushPayload,
  Reply,
  RequestInput,
  RequestName,
} from './events.ts';

type Acknowledge<Name extends RequestName> = (reply: Reply<Name>) => void;

export type ClientToServerEvents = {
  [Name in RequestName]: (input: RequestInput<Name>, acknowledge: Acknowledge<Name>) => void;
};

export type ServerToClientEvents = {
  [Name in Exclude<PushName, 'messages'>]: (payload: PushPayload<Name>) => void;
} & {
  messages: (
    payload: PushPayload<'messages'>,
    acknowledge: (acknowledgement: MessagesAcknowledgement) => void,
  ) => void;
};
