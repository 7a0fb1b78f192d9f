/** The inspector's page starts here. */
import './without-eval.ts';
import { render } from 'preact';
import { App } from './app.tsx';
import { applyTheme } from './theme.ts';
import './styles/tokens.css';
import './styles/base.css';
import './styles/parts.css';
import './styles/pages.css';

applyTheme();
render(<App />, document.getElementById('app')!);
